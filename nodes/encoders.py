"""Image encoders for EncodeReference: found by content, held once per file by a ModelPatcher, or a wired CLIP_VISION."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import comfy.model_management as mm
import comfy.model_patcher
import torch

from ..flexip_core.encoders import towers
from ..flexip_core.encoders.published import is_published
from ..flexip_core.files.stored import first_parts
from ..flexip_core.files.weights import read_header
from ..flexip_core.network.config import ClipConfig, DinoConfig, FeatureNeed
from ..flexip_core.pictures import crop
from . import files
from .errors import named

NODE = "EncodeReference"
Features = dict[str, torch.Tensor]  # by kind, as FeatureNeed names them
Runner = Callable[[torch.Tensor, Collection[str]], Features]  # normalised pixels (b, 3, s, s) and the kinds wanted
CHUNK = 8  # pictures per forward pass: bounds the memory of a long list of references
_loaded: WeakValueDictionary[tuple, comfy.model_patcher.ModelPatcher] = WeakValueDictionary()
_nulls: WeakKeyDictionary[comfy.model_patcher.ModelPatcher, Features] = WeakKeyDictionary()  # of the zero picture


def refuse_misfits(needs: tuple[FeatureNeed, ...], choices: dict[str, str], node: str) -> None:
    """A chosen file that fits none of the needs of its role is refused, before any tensor is read."""
    for role, choice in choices.items():
        mine = [need for need in needs if role_of(need) == role]
        if choice != files.AUTO and mine:
            shapes = _shapes_of_file(choice, node)
            if not any(towers.fits_shapes(shapes, need.encoder) for need in mine):
                with named(node):
                    towers.check_fits(choice, shapes, mine[0].encoder)


def resolve(need: FeatureNeed, choices: dict[str, str]) -> tuple[str | None, str]:
    """Path of the encoder file for a need: the chosen one if it fits, else one in the folder that does; None without any.

    With it, a note for the report where several files fit.
    """
    choice = choices[role_of(need)]
    if choice != files.AUTO and towers.fits_shapes(_shapes_of_file(choice, NODE), need.encoder):
        return files.path_of(files.ENCODER_FOLDER, choice, NODE), ""
    found = _fitting(need.encoder)
    if len(found) < 2:
        return next(iter(found.values()), None), ""
    taken = next((name for name, path in found.items() if is_published(path)), next(iter(found)))
    words = f"chosen from {len(found)} that fit: {files.listed(list(found))}"
    logging.info("%s: %s, %s. Choose another one by its name in %s.", NODE, taken, words, role_of(need))
    return found[taken], f" ({words})"


def _shapes_of_file(name: str, node: str) -> dict[str, tuple[int, ...]]:
    path = files.path_of(files.ENCODER_FOLDER, name, node)
    with named(node):
        return read_header(path).shapes


def _fitting(cfg: ClipConfig | DinoConfig) -> dict[str, str]:
    """Name -> path of every file in the folder that fills the tower of `cfg`; a set of parts counts once."""
    found = {}
    for name in first_parts(files.names(files.ENCODER_FOLDER)):
        with suppress(ValueError):  # who chooses the file by its name is told what is wrong with it
            path = files.path_of(files.ENCODER_FOLDER, name, NODE)
            if towers.fits_shapes(read_header(path).shapes, cfg):
                found[name] = path
    return found


def features(
    needs: list[FeatureNeed], path: str | None, wired: Any, pictures: torch.Tensor, owner: dict
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]:
    """What `needs`, all of one encoder, ask for: by name, of prepared pictures (r, s, s, 3) and of the null reference, on the
    CPU in float32.

    Each picture goes through the encoder once; the null picture once per encoder, and its result is kept as long as the weights.
    Also returns where the weights came from, for the report. A tower read from a file lives as long as `owner`, where it is noted.
    """
    encoder = needs[0].encoder
    if wired is not None:
        patcher, run = _core_runner(
            encoder, wired, pictures
        )  # ComfyUI refers to patchers weakly: held here until the end
        source = f"the {role_of(needs[0])} socket"
    elif path is None:
        raise ValueError(_none_found(needs[0]))
    else:
        patcher = owner[repr(encoder)] = _patcher(encoder, path)
        mm.load_models_gpu([patcher], memory_required=_memory(pictures), force_full_load=True)
        run, source = patcher.model.features, os.path.basename(path)
    pixels = crop.normalise(pictures, *towers.normalisation(encoder))

    def encode(pixels: torch.Tensor, kinds: set[str]) -> Features:
        mm.throw_exception_if_processing_interrupted()
        found = run(pixels, kinds)
        return {kind: found[kind].float().cpu() for kind in kinds}

    with torch.no_grad():
        chunks = [encode(chunk, {need.kind for need in needs}) for chunk in pixels.split(CHUNK)]
        seen = {kind: torch.cat([chunk[kind] for chunk in chunks]) for kind in chunks[0]}
        nulls = _nulls.setdefault(patcher, {})
        lacking = {need.kind for need in needs if need.null != "zeros"} - nulls.keys()
        if lacking:
            nulls.update(encode(torch.zeros_like(pixels[:1]), lacking))
    feature = {need.name: seen[need.kind] for need in needs}
    null = {
        need.name: torch.zeros_like(seen[need.kind])
        if need.null == "zeros"
        else nulls[need.kind].expand_as(seen[need.kind])
        for need in needs
    }
    if not all(crop.finite(t) for t in (*feature.values(), *null.values())):
        nulls.clear()  # a download may be repeated under the same name
        raise ValueError(
            f"{NODE}: the encoder {encoder.model} from {source} gives values that are not numbers (NaN or infinite), so every picture would be black. "
            "Download its file again, or start ComfyUI with --force-fp32 if it overflows in half precision."
        )
    return feature, null, source


def role_of(need: FeatureNeed) -> str:
    return "dino" if need.kind == "patches" else "clip_vision"


def wired_for(need: FeatureNeed, wired: Any) -> Any:
    """The wired core model if it can serve this need; a wire that serves none of its needs is refused by `refuse_unused`."""
    return wired if wired is not None and towers.fits_shapes(_shapes(wired), need.encoder) else None


def refuse_unused(needs: list[FeatureNeed], wired: Any) -> None:
    if wired is not None and not any(wired_for(need, wired) for need in needs):
        with named(NODE):
            if not needs:
                raise ValueError("these adapters read no such encoder; disconnect it.")
            towers.check_fits(f"The model on the {role_of(needs[0])} socket", _shapes(wired), needs[0].encoder)


def _shapes(clip_vision: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in clip_vision.get_sd().items()}


def _patcher(cfg: ClipConfig | DinoConfig, path: str) -> comfy.model_patcher.ModelPatcher:
    """open_clip's and timm's layers do not cast, so the tower is loaded whole and in one dtype, by a plain ModelPatcher."""
    key = (path, os.stat(path).st_mtime_ns, repr(cfg), _dtype())
    patcher = _loaded.get(key)
    if patcher is None:
        with named(NODE):
            patcher = _loaded[key] = wrap(towers.load_tower(cfg, path, _dtype()))
    return patcher


def _dtype() -> torch.dtype:
    return torch.float16 if mm.should_use_fp16(mm.text_encoder_device()) else torch.float32


def wrap(tower: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """Whole or not at all: towers are loaded with `force_full_load`. ComfyUI refers to patchers weakly, so hold the result."""
    return comfy.model_patcher.ModelPatcher(
        tower, load_device=mm.text_encoder_device(), offload_device=mm.text_encoder_offload_device()
    )


def _core_runner(encoder: ClipConfig | DinoConfig, clip_vision: Any, pictures: torch.Tensor) -> tuple[Any, Runner]:
    """A loaded core CLIP_VISION: run as it is at its own size, otherwise its weights go into our tower (the shared object is not changed)."""
    if clip_vision.image_size != towers.image_size(encoder):
        # lives for this one run of the node
        patcher = wrap(towers.load_tower(encoder, clip_vision.get_sd(), _dtype()))
        mm.load_models_gpu([patcher], memory_required=_memory(pictures), force_full_load=True)
        return patcher, patcher.model.features
    mm.load_model_gpu(clip_vision.patcher)
    skipped = 1 + towers.wanted_shape(encoder).registers

    def run(pixels: torch.Tensor, kinds: Collection[str]) -> Features:
        last, penultimate, embedding, *_ = clip_vision.model(
            pixel_values=pixels.to(clip_vision.load_device), intermediate_output=-2
        )
        return {"embedding": embedding, "penultimate": penultimate, "patches": last[:, skipped:]}

    return clip_vision.patcher, run


def _memory(pictures: torch.Tensor) -> int:
    """Activations of one chunk, generously: a ViT-H holds about 60 MB per 224 px picture in fp16."""
    return min(len(pictures), CHUNK) * pictures.shape[1] * pictures.shape[2] * 2048


def _none_found(need: FeatureNeed) -> str:
    seen = []
    for name in first_parts(files.names(files.ENCODER_FOLDER)):
        try:
            shapes = read_header(files.path_of(files.ENCODER_FOLDER, name, NODE)).shapes
            seen.append(f"{name} {towers.why_not(shapes, need.encoder)}")
        except ValueError as error:
            seen.append(str(error).removeprefix(f"{NODE}: ").rstrip("."))
    return (
        f"{NODE}: these adapters want {towers.describe_model(need.encoder)}, and no file in {files.searched(files.ENCODER_FOLDER)} is one. "
        f"Looked at: {'; '.join(seen) or 'no files at all'}. Put the encoder's file there, or wire a loaded one into {role_of(need)}."
    )
