"""ApplyFlexIPGate: a model whose text cross-attentions also read the reference."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.v0_0_2 import io

from ..flexip_core.network.blocks import block_levels, block_widths
from ..flexip_core.network.config import DinoConfig, FeatureNeed
from ..flexip_core.pictures.crop import as_masks
from ..flexip_core.run.chain import Link
from ..flexip_core.run.depth import BlockStrengths
from ..flexip_core.run.reference import Reference, ReferenceSet
from ..flexip_core.run.schedule import GateBatch, GateCurve
from . import notices, runtime
from .checks import check_numbers
from .errors import named
from .load import LoadedAdapters
from .types import (
    START_MENU,
    FlexIPAdapters,
    FlexIPBlockStrengths,
    FlexIPGate,
    FlexIPReference,
    gate_input,
    strength_input,
)

NODE = "ApplyFlexIPGate"


class ApplyFlexIPGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Apply FlexIP Gate",
            category=START_MENU,
            description="One gate between 'keep this subject' (1) and 'follow my prompt' (0). Works with every sampler; several can be chained.",
            search_aliases=[
                "ip-adapter",
                "ipadapter apply",
                "reference image",
                "identity",
                "subject",
                "gate",
                "mask",
                "attention mask",
                "weight",
            ],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5 or SDXL, the base that the adapters were made for."),
                FlexIPAdapters.Input(
                    "adapters",
                    optional=True,
                    tooltip="From Load FlexIP Adapters. Usually not needed: a reference brings its adapters along; only one loaded from a file does not.",
                ),
                FlexIPReference.Input("reference", tooltip="From Encode Reference."),
                gate_input(
                    "1 keeps the subject as in the reference, 0 lets the prompt change it; in between it changes smoothly."
                ),
                strength_input("How strongly the reference acts overall. 0 is the bare model."),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Part of the sampling at which the reference begins to act.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Part of the sampling at which the reference stops acting.",
                ),
                FlexIPGate.Input(
                    "gate_schedule",
                    optional=True,
                    tooltip="A gate that changes over the sampling or over the batch, from FlexIP Gate Schedule or FlexIP Gate Batch; used instead of the slider.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the reference acts: white fully, black not at all. Any size; a batch gives each latent its own.",
                ),
                io.Mask.Input(
                    "gate_mask",
                    optional=True,
                    tooltip="Where the subject is kept: white has the gate above, black has gate 0 (all prompt), grey lies between.",
                ),
                FlexIPBlockStrengths.Input(
                    "blocks",
                    optional=True,
                    tooltip="Strength per block of the UNet, from FlexIP Blocks: composition only, style only, or your own list.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The gated model, for any sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # puts the node's id into its cache key: the report must find the node it came from
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapters: LoadedAdapters | None = None,
        reference: Any = None,  # a Reference or ReferenceSet, always: Python wants a default after an optional one
        gate: float = 0.6,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        gate_schedule: GateCurve | GateBatch | None = None,
        mask: torch.Tensor | None = None,
        gate_mask: torch.Tensor | None = None,
        blocks: BlockStrengths | None = None,
    ) -> io.NodeOutput:
        adapters = adapters or reference.adapters
        if adapters is None:
            raise ValueError(
                f"{NODE}: the reference was loaded from a file, without its adapters. Wire Load FlexIP Adapters into adapters."
            )
        check_base(model, adapters)
        check_reference(adapters, reference)
        check_numbers(NODE, 0, 1, gate=gate, start_percent=start_percent, end_percent=end_percent)
        check_numbers(NODE, 0, 5, strength=strength)
        if start_percent >= end_percent:
            raise ValueError(
                f"{NODE}: start_percent {start_percent:g} is not before end_percent {end_percent:g}, so the reference would never act. Set start_percent below end_percent."
            )
        with named(NODE):
            link = Link(
                network=adapters.network,
                patcher=adapters.patcher,
                reference=reference,
                gates=(gate,) if gate_schedule is None else gate_schedule,
                strength=strength,
                start_percent=start_percent,
                end_percent=end_percent,
                title=adapters.title,
                files=adapters.files,
                node_id=notices.id_of(cls),
                mask=None if mask is None else as_masks(mask, "The mask"),
                gate_mask=None if gate_mask is None else as_masks(gate_mask, "The gate mask"),
                depth=None if blocks is None else blocks.resolve(block_levels(model.model.diffusion_model)),
            )
        return io.NodeOutput(runtime.attach(model, link))


def check_base(model: Any, adapters: LoadedAdapters) -> None:
    """Every cross-attention of the model must be one of the adapters' blocks, with the same widths, and the other way round."""
    widths, text_width = block_widths(model.model.diffusion_model)
    name = type(model.model.model_config).__name__  # such as SD15, SDXL
    if not widths:
        raise ValueError(
            f"{NODE}: the model ({type(model.model).__name__}) is not a UNet with text cross-attentions. FlexIP works with SD1.5 and SDXL checkpoints; load one of those."
        )
    wanted = adapters.network.block_widths
    if widths == wanted and text_width == adapters.network.text_width:
        return
    text = f"{adapters.title} was made for {adapters.network.base} ({len(wanted)} cross-attention blocks, text width {adapters.network.text_width}), but the checkpoint ({name}) "
    if widths.keys() == wanted.keys() and text_width == adapters.network.text_width:
        block = next(address for address in wanted if widths[address] != wanted[address])
        text += f"has width {widths[block]} in block {block}, not {wanted[block]}."
    else:
        text += f"has {len(widths)} blocks and text width {text_width}."
    raise ValueError(f"{NODE}: {text} Use a checkpoint and adapters of the same base.")


def check_reference(adapters: LoadedAdapters, reference: Reference | ReferenceSet) -> None:
    wanted = adapters.network.needs()
    if reference.needs != wanted:
        raise ValueError(
            f"{NODE}: the reference was encoded for other adapters. Wire {adapters.title} into Encode Reference, too. "
            f"Needed: {_in_words(wanted)}; given: {_in_words(reference.needs)}."
        )


def _in_words(needs: tuple[FeatureNeed, ...]) -> str:
    """From the configs alone: one that came out of a file may name an encoder that nobody knows."""

    def size(need: FeatureNeed) -> str:
        encoder = need.encoder
        pixels = encoder.image_size if isinstance(encoder, DinoConfig) else (encoder.vision_cfg or {}).get("image_size")
        return f" {pixels} px" if pixels else ""

    return ", ".join(f"{need.name} from {need.encoder.model}{size(need)} ({need.width} wide)" for need in needs)
