"""EncodeReference: pictures -> what the adapters read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui

from ..flexip_core.encoders.towers import image_size
from ..flexip_core.network.config import FeatureNeed
from ..flexip_core.pictures.crop import CROPS, as_masks, prepare
from ..flexip_core.run.reference import Reference
from . import encoders, files
from .compat import KEEP_PREVIEW
from .errors import named
from .load import LoadedAdapters
from .types import START_MENU, FlexIPAdapters, FlexIPReference

NODE = "EncodeReference"


class EncodeReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Encode Reference",
            category=START_MENU,
            description="Shows the reference picture to the image encoders. Several pictures (a batch or a list, sizes may differ) are one subject seen several times.",
            search_aliases=[
                "reference",
                "reference image",
                "clip vision encode",
                "ip-adapter encode",
                "identity",
                "prep image",
                "mask",
            ],
            is_input_list=True,
            **KEEP_PREVIEW,
            inputs=[
                FlexIPAdapters.Input(
                    "adapters", tooltip="From Load FlexIP Adapters: they decide which encoders are needed."
                ),
                io.Image.Input(
                    "image", tooltip="Reference picture(s), any size. An alpha channel counts as the subject mask."
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default="center",
                    tooltip="How the picture becomes a square: center cuts out the middle; pad shows it whole with borders; squash shows it whole, distorted; subject cuts around the mask.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is; used by crop = subject. LoadImage's mask is white where the picture is transparent: invert it first.",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="An already loaded CLIP encoder to use instead of the file."
                ),
                io.ClipVision.Input(
                    "dino", optional=True, tooltip="An already loaded DINOv2 encoder to use instead of the file."
                ),
            ],
            outputs=[
                FlexIPReference.Output(
                    "reference",
                    display_name="reference",
                    tooltip="The encoded reference; wire it into Apply FlexIP Gate.",
                )
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> list:
        """With auto the encoders depend on what is in the folder, and they are looked up here, not in LoadFlexIPAdapters."""
        return files.state_of(files.ENCODER_FOLDER)

    @classmethod
    def execute(
        cls,
        adapters: list[LoadedAdapters],
        image: list[torch.Tensor],
        crop: list[str],
        mask: list | None = None,
        clip_vision: list | None = None,
        dino: list | None = None,
    ) -> io.NodeOutput:
        loaded, needs = adapters[0], adapters[0].network.needs()
        wires = {"clip_vision": _first(clip_vision), "dino": _first(dino)}
        for role, wire in wires.items():
            encoders.refuse_unused([need for need in needs if encoders.role_of(need) == role], wire)
        pairs = list(_pictures(image, mask))
        seen = {
            size: torch.stack([_prepared(picture, m, crop[0], size) for picture, m in pairs])
            for size in {image_size(need.encoder) for need in needs}
        }
        features: dict[str, torch.Tensor] = {}
        null: dict[str, torch.Tensor] = {}
        sources = []
        for wire, path, note, alike in _by_encoder(needs, wires, loaded):
            size = image_size(alike[0].encoder)
            found, without, source = encoders.features(alike, path, wire, seen[size], loaded.towers)
            features |= found
            null |= without
            sources += [f"{need.encoder.model} from {source}{note}" for need in alike]
        reference = Reference(features, null, ", ".join(dict.fromkeys(sources)), needs, loaded)
        return io.NodeOutput(reference, ui=ui.PreviewImage(seen[max(seen)], cls=cls))


def _by_encoder(
    needs: Sequence[FeatureNeed], wires: dict[str, Any], loaded: LoadedAdapters
) -> Iterator[tuple[Any, str | None, str, list[FeatureNeed]]]:
    """(wired model or None, path of the file or None, a note about the choice, the needs that this one encoder serves), so that
    it runs once for all."""
    groups: dict[tuple, tuple[Any, str | None, str, list[FeatureNeed]]] = {}
    for need in needs:
        role = encoders.role_of(need)
        wire = encoders.wired_for(need, wires[role])
        path, note = (loaded.own.get(role) if wire is None else None), ""
        if wire is None and path is None:
            path, note = encoders.resolve(need, loaded.encoders)
        groups.setdefault((repr(need.encoder), id(wire), path), (wire, path, note, []))[3].append(need)
    yield from groups.values()


def _first(values: list | None) -> Any:
    return values[0] if values else None


def _pictures(batches: list[torch.Tensor], masks: list | None):
    """Every picture with its mask: masks are repeated where there are fewer, as ComfyUI does with batches."""
    pictures = [picture for batch in batches if batch is not None for picture in batch]
    with named(NODE):
        flat = [m for batch in masks or [] if batch is not None for m in as_masks(batch, "The mask")]
    if not pictures:
        raise ValueError(f"{NODE}: expected at least one picture, got an empty batch. Connect an image.")
    for number, picture in enumerate(pictures):
        yield picture, flat[number % len(flat)] if flat else None


def _prepared(picture: torch.Tensor, mask: torch.Tensor | None, crop: str, size: int) -> torch.Tensor:
    with named(NODE):
        return prepare(picture, mask, crop, size)
