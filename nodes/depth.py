"""FlexIPBlocks: how strongly each adapter acts in each block of the UNet."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..flexip_core.network.blocks import block_levels
from ..flexip_core.run import depth
from . import notices
from .types import CONTROL_MENU, FlexIPBlockStrengths

EXAMPLE = "input.4=0.5, output=1, middle=0, all=0.2"


class FlexIPBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=depth.NODE,
            display_name="FlexIP Blocks",
            category=CONTROL_MENU,
            description="How strongly each of the two adapters acts in each block of the UNet: only the composition, only the style, coarse shapes, fine detail, or block by block.",
            search_aliases=[
                "block weights",
                "layer weights",
                "style transfer",
                "composition transfer",
                "instantstyle",
                "mad scientist",
                "style",
                "composition",
                "layout",
            ],
            inputs=[
                _choice("preservation", "keeps the subject"),
                _choice("personalization", "follows the prompt"),
                _list("preservation"),
                _list("personalization"),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="With a model, this node shows the strength of every block and finds a wrong address before sampling.",
                ),
            ],
            outputs=[
                FlexIPBlockStrengths.Output(
                    "blocks", display_name="blocks", tooltip="Wire it into Apply FlexIP Gate, blocks."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        preservation: str,
        personalization: str,
        preservation_list: str,
        personalization_list: str,
        model: Any | None = None,
    ) -> io.NodeOutput:
        strengths = depth.BlockStrengths(
            depth.spec("preservation", preservation, preservation_list),
            depth.spec("personalization", personalization, personalization_list),
        )
        if model is None:
            return io.NodeOutput(strengths)
        levels = block_levels(model.model.diffusion_model)
        if not levels:
            raise ValueError(
                f"{depth.NODE}: the model ({type(model.model).__name__}) is not a UNet with text cross-attentions, so it has no blocks. Wire the SD1.5 or SDXL model that Apply FlexIP Gate gets."
            )
        return io.NodeOutput(strengths, ui=notices.said(notices.sentences(strengths.in_words(levels))))


def _choice(adapter: str, purpose: str) -> io.Combo.Input:
    return io.Combo.Input(
        adapter,
        options=[*depth.PRESETS, depth.LIST],
        default=depth.PRESETS[0],
        tooltip=f"Where the {adapter} adapter ({purpose}) acts: all blocks, those of the composition or of the style, the coarse or the fine half. list: as written in {adapter}_list, an advanced input.",
    )


def _list(adapter: str) -> io.String.Input:
    return io.String.Input(
        f"{adapter}_list",
        default="all=1",
        multiline=True,
        placeholder=EXAMPLE,
        dynamic_prompts=False,
        advanced=True,
        tooltip=f"Read when {adapter} is list: blocks with strengths from 0 to 5, such as {EXAMPLE}. input.4 covers all transformers of that block; later entries win; all stands for every block that is not named.",
    )
