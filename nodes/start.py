"""FlexIPStart: one node that stands for the graph of the others, chosen by a preset and by what lies in the folders."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import GraphBuilder

from ..flexip_core.pictures.crop import CROPS
from ..flexip_core.run.depth import NODE as BLOCKS
from . import encode, files, found, load
from .apply import NODE as APPLY
from .found import Wanted
from .types import START_MENU, FlexIPAdapters, FlexIPReference, gate_input, strength_input

NODE = "FlexIPStart"
FLEXIP_FILE = "FlexIP file"
PLUS, PLAIN, FACE = Wanted("plus"), Wanted("plain"), Wanted("plus", face=True)
# Preset -> ((file at gate 1, its blocks), (file at gate 0, its blocks) or None). The blocks are presets of FlexIPBlocks.
PRESETS: dict[str, tuple] = {
    "subject": ((PLUS, "all"), (PLAIN, "style only")),
    "portrait": ((FACE, "all"), None),
    "whole look": ((PLUS, "all"), (PLAIN, "all")),
    "style only": ((PLAIN, "style only"), None),
    "layout": ((PLAIN, "composition only"), None),
}


class FlexIPStart(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        adapters = files.adapter_names()
        percent = {"min": 0.0, "max": 1.0, "step": 0.001, "advanced": True}
        return io.Schema(
            node_id=NODE,
            display_name="FlexIP",
            category=START_MENU,
            description="Drop in a picture, write a prompt, move one slider: 1 keeps what the picture shows, 0 follows the prompt. It finds the files that fit the model by itself.",
            search_aliases=[
                "ip adapter",
                "ip-adapter",
                "ipadapter",
                "image prompt",
                "reference image",
                "identity",
                "likeness",
                "consistent character",
                "consistency",
                "same person",
                "keep subject",
                "face",
                "portrait",
                "style",
                "composition",
                "character",
            ],
            enable_expand=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="An SD1.5 or SDXL checkpoint; which of the two is read from the model itself."
                ),
                io.Image.Input(
                    "image",
                    raw_link=True,
                    tooltip="The reference picture, any size; several pictures are one subject seen several times.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, FLEXIP_FILE],
                    default="subject",
                    tooltip="What gate 1 keeps. subject: whatever is shown. portrait: the face. whole look: everything, with a weaker likeness at 0. style only and layout: just that. FlexIP file: as the file was trained.",
                ),
                gate_input("1 keeps what the preset names, 0 lets the prompt decide; in between it changes smoothly."),
                strength_input(
                    "How strongly the reference acts overall. With one file the gate does the same, so the page hides this."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    raw_link=True,
                    tooltip="Where the reference acts in the new picture: white fully, black not at all.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default="center",
                    optional=True,
                    advanced=True,
                    tooltip="How the picture becomes a square: center cuts out the middle; pad shows it whole with borders; squash shows it whole, distorted; subject cuts around what is not transparent.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    optional=True,
                    **percent,
                    tooltip="Part of the sampling at which the reference begins to act.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    optional=True,
                    **percent,
                    tooltip="Part of the sampling at which the reference stops acting.",
                ),
                io.Combo.Input(
                    "preservation",
                    options=[files.AUTO, *adapters],
                    default=files.AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="The file at gate 1. auto: found by its contents. The button below fills in the names of the files that were found.",
                ),
                io.Combo.Input(
                    "personalization",
                    options=[files.AUTO, *adapters],
                    default=files.AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="The file at gate 0, for presets with two. auto: found by its contents.",
                ),
                io.Combo.Input(
                    "clip_vision",
                    options=[files.AUTO, *files.names(files.ENCODER_FOLDER)],
                    default=files.AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="CLIP image encoder in models/clip_vision. auto: the file there that fits, found by its contents.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The gated model, for any sampler."),
                FlexIPReference.Output(
                    "reference",
                    display_name="reference",
                    tooltip="The encoded reference, for further Apply FlexIP Gate nodes.",
                ),
                FlexIPAdapters.Output("adapters", display_name="adapters", tooltip="The adapters that were found."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> list:
        """What is found depends on everything in the folders."""
        return [state for folder in files.ADAPTER_FOLDERS for state in files.state_of(folder)]

    @classmethod
    def execute(
        cls,
        model: Any,
        image: list,
        preset: str,
        gate: float,
        strength: float,
        mask: list | None = None,
        crop: str = "center",
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        preservation: str = files.AUTO,
        personalization: str = files.AUTO,
        clip_vision: str = files.AUTO,
    ) -> io.NodeOutput:
        first, second, depth = chosen(model, preset, preservation, personalization)
        graph = GraphBuilder()
        adapters = graph.node(
            load.NODE,
            preservation=first,
            personalization=second,
            clip_vision=clip_vision,
            dino=files.AUTO,
        )
        reference = graph.node(encode.NODE, adapters=adapters.out(0), image=image, crop=crop)
        # ComfyUI sends its picture again after every run, which would push the report off this node; no node has this id
        reference.set_override_display_id(f"{reference.id}.picture")
        more = {} if mask is None else {"mask": mask}
        if depth is not None:
            preservation_blocks, personalization_blocks = depth
            blocks = graph.node(
                BLOCKS,
                preservation=preservation_blocks,
                personalization=personalization_blocks,
                preservation_list="all=1",
                personalization_list="all=1",
            )
            more["blocks"] = blocks.out(0)
        gated = graph.node(
            APPLY,
            model=model,
            reference=reference.out(0),
            gate=gate,
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
            **more,
        )
        return io.NodeOutput(gated.out(0), reference.out(0), adapters.out(0), expand=graph.finalize())


def chosen(model: Any, preset: str, preservation: str, personalization: str) -> tuple[str, str, tuple[str, str] | None]:
    """The files of both sides ("auto" for no second one), and the blocks of both where these are not all blocks."""
    if preset == FLEXIP_FILE:
        return flexip_file(model) if preservation == files.AUTO else preservation, files.AUTO, None
    base = found.base_of(model)
    if base is None:
        name = type(model.model).__name__
        raise ValueError(
            f"{NODE}: the preset {preset!r} reads IP-Adapter files, which exist for SD1.5 and SDXL, but the model ({name}) is "
            f"neither. Load an SD1.5 or SDXL checkpoint, or choose the preset {FLEXIP_FILE!r}."
        )
    (one, one_blocks), zero = PRESETS[preset]
    if preset == "subject" and base == "SD1.5":
        zero = None  # InstantStyle calls its SD1.5 blocks experimental; ours of that name are 11 of 16
    names = found.fitting(model, NODE)
    first = preservation
    if first == files.AUTO:
        first = found.choose(one, names, base, NODE).name
    if zero is None:
        return first, files.AUTO, None if one_blocks == "all" else (one_blocks, "all")
    second, clip = personalization, next((file.clip for file in names if file.name == first), "")
    if second == files.AUTO:
        second = found.choose(zero[0], names, base, NODE, clip).name
    return first, second, None if one_blocks == zero[1] == "all" else (one_blocks, zero[1])


def flexip_file(model: Any) -> str:
    names = [file.name for file in found.fitting(model, NODE) if file.family == found.FLEXIP]
    if not names:
        where = files.searched("flexip")
        raise ValueError(
            f"{NODE}: no FlexIP file in {where} is made for this model. Train one with Train FlexIP, or choose another preset."
        )
    return names[0]
