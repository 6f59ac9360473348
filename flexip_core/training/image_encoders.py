"""The image encoders that adapters are trained for: what a file holds, why another one does not fit, and which one to take by default."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from ..encoders.layouts import describe, identify
from ..encoders.published import is_published
from ..encoders.scorer_files import Unsuited, clip_scorer, dino_scorer
from ..encoders.towers import check_fits, fits_shapes
from ..files.weights import name_of, read_header
from ..network.config import ClipConfig, DinoConfig

NEEDED = {  # by the name that [task] and the node have for it
    "clip_vision": "a CLIP ViT image encoder, such as CLIP ViT-H/14",
    "dino": "a DINOv2 image encoder, such as DINOv2 ViT-L/14",
}
_OWN = {"clip_vision": ClipConfig(), "dino": DinoConfig()}
_TOLD_BY_SHAPES = {"clip_vision": clip_scorer, "dino": dino_scorer}


def encoder_in(role: str, path: str | Path) -> ClipConfig | DinoConfig:
    """The tower in this file: FlexIP's own where it fits, otherwise recognised by the shapes (heads and activation: scorer_files).

    ValueError, one sentence with the role, the file, what it is and what is needed. Reads no more than the header and one tensor.
    """
    name, shapes = name_of(path), read_header(path).shapes
    if fits_shapes(shapes, _OWN[role]):
        return _OWN[role]
    need = f"training needs {NEEDED[role]}; choose another file"
    try:
        encoder = _TOLD_BY_SHAPES[role](name, path).encoder
    except Unsuited as error:
        raise ValueError(f"{role}: {error.found}, but {need}.") from None
    check_fits(f"{role}: {name}", shapes, encoder, need)
    return encoder


def choose(role: str, paths: Mapping[str, str], where: str) -> str:
    """Of files by name, the path of the one that FlexIP reads by default, else of the largest that serves. ValueError if none does."""
    found = []
    for name, path in paths.items():
        try:
            encoder, shape = encoder_in(role, path), identify(read_header(path)).shape
        except ValueError:
            continue  # who chooses the file by its name is told what is wrong with it
        found.append((encoder != _OWN[role], -shape.depth * shape.width**2, not is_published(path), name))
    if not found:
        looked = ", ".join(f"{name} ({_what(path)})" for name, path in paths.items()) or "no files at all"
        raise ValueError(f"{role}: no file in {where} is {NEEDED[role]}; put one there. Looked at: {looked}.")
    taken = min(found)
    equal = sorted(name for *rank, _, name in found if rank == list(taken[:2]))
    if len(equal) > 1:
        logging.info("%s: %s, chosen from %d that fit equally: %s.", role, taken[-1], len(equal), ", ".join(equal))
    return paths[taken[-1]]


def _what(path: str) -> str:
    try:
        file = identify(read_header(path))
    except ValueError:
        return "unreadable"
    return describe(file) if file else "not an image encoder known here"
