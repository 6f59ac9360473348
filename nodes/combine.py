"""FlexIPCombineReferences: several references with a weight each, and a negative one."""

from __future__ import annotations

import torch
from comfy_api.v0_0_2 import io

from ..flexip_core.pictures.crop import as_masks
from ..flexip_core.run.reference import COMBINE, Reference, ReferenceSet
from ..flexip_core.run.schedule import parse_numbers
from .errors import named
from .types import REFERENCES_MENU, FlexIPReference

NODE = "FlexIPCombineReferences"
MOST = 50  # sockets; a batch of pictures in one Encode Reference may be longer
SPLIT = ("average", "one per batch item")  # work picture by picture


class FlexIPCombineReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="FlexIP Combine References",
            category=REFERENCES_MENU,
            description="Several references for one Apply FlexIP Gate: mixed by weight, one per picture of the batch, or one per region. Also takes a negative reference: what to stay away from.",
            search_aliases=[
                "combine embeds",
                "multiple references",
                "ip-adapter batch",
                "regional",
                "negative reference",
                "negative image",
                "style",
                "reference",
            ],
            inputs=[
                io.Autogrow.Input(
                    "references",
                    template=io.Autogrow.TemplatePrefix(
                        FlexIPReference.Input("reference", tooltip="From Encode Reference or Load FlexIP Reference."),
                        prefix="reference_",
                        min=1,
                        max=MOST,
                    ),
                    tooltip="The references; a socket appears when one is wired. All encoded for the same adapters.",
                ),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINE),
                    default=COMBINE[0],
                    tooltip="concatenate: all act at once, each picture with its own tokens. average: one blend of all. one per batch item: latent 1 gets picture 1, and so on. one per region: each acts where its mask is.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="One number per reference, such as 1, 0.5; empty: 1 each. For concatenate and average only their ratio counts (2 is like wiring a reference twice, 0 leaves it out); for the others they scale that reference's strength.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="For one per region: a batch with one mask per reference, white where it acts. Regions may overlap.",
                ),
                FlexIPReference.Input(
                    "negative",
                    optional=True,
                    tooltip="What the picture should stay away from: the negative prompt sees this reference instead of none.",
                ),
            ],
            outputs=[
                FlexIPReference.Output(
                    "reference", display_name="reference", tooltip="For Apply FlexIP Gate and FlexIP Conditioning."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        references: io.Autogrow.Type,
        combine: str,
        weights: str,
        masks: torch.Tensor | None = None,
        negative: Reference | ReferenceSet | None = None,
    ) -> io.NodeOutput:
        with named(NODE):
            parts = [reference for reference in references.values() if reference is not None]
            values = parse_numbers(weights, 0.0, 10.0, "weights")
            return io.NodeOutput(combine_references(parts, values, combine, masks, negative))


def combine_references(
    parts: list[Reference],
    weights: tuple[float, ...],
    combine: str,
    masks: torch.Tensor | None = None,
    negative: Reference | ReferenceSet | None = None,
) -> ReferenceSet:
    """Checked, and split into pictures where `combine` goes picture by picture; a picture has its reference's weight."""
    if not parts:
        raise ValueError("no reference is wired. Wire at least one.")
    if isinstance(negative, ReferenceSet) or any(not isinstance(part, Reference) for part in parts):
        raise ValueError(
            "a reference comes from another FlexIP Combine References. Wire its references into this node instead."
        )
    if any(part.needs != parts[0].needs for part in (*parts, *([] if negative is None else [negative]))):
        raise ValueError(
            "the references were encoded for different adapters. Wire the same adapters into every Encode Reference."
        )
    weights = weights or (1.0,) * len(parts)
    if len(weights) != len(parts):
        raise ValueError(f"got {len(weights)} weights for {len(parts)} references. Give one each, or none.")
    if not any(weights):
        raise ValueError(
            "all weights are 0, so no reference would be left. Raise one, or set the strength of Apply FlexIP Gate to 0."
        )
    if combine == "one per region":
        if masks is None:
            raise ValueError("one per region needs masks: a batch with one mask per reference.")
        masks = as_masks(masks, "The batch of masks")
        if len(masks) != len(parts):
            raise ValueError(
                f"got {len(masks)} masks for {len(parts)} references; one per region needs one each. Use Batch Masks."
            )
    elif masks is not None:
        raise ValueError(
            f"masks are only used by one per region, but combine is {combine}. Disconnect them, or change combine."
        )
    if combine in SPLIT:
        pairs = [(picture, weight) for part, weight in zip(parts, weights) for picture in part.pictures]
        parts, weights = [picture for picture, _ in pairs], tuple(weight for _, weight in pairs)
    return ReferenceSet(tuple(parts), tuple(weights), combine, masks, negative)
