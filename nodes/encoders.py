"""Image encoders for EncodeReference: found by content, held once per file by a ModelPatcher, or a wired CLIP_VISION."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_management as mm
import comfy.model_patcher
import torch

from ..flexip_core import encoder_files, encoders, images
from ..flexip_core.config import ClipConfig, DinoConfig
from ..flexip_core.weights import read_header
from . import files

NODE = "EncodeReference"
CHUNK = 8  # pictures per forward pass: bounds the memory of a long list of references
_loaded: WeakValueDictionary[tuple, comfy.model_patcher.ModelPatcher] = WeakValueDictionary()


def resolve(choice: str, cfg: ClipConfig | DinoConfig, node: str) -> str | None:
    """Path of the encoder file for `cfg`; None if "auto" finds none (a wire may bring it).

    A chosen file that does not fit is refused here, before any tensor is read.
    """
    if choice != files.AUTO:
        path = files.path_of(files.ENCODER_FOLDER, choice, node)
        with named(node):
            encoders.check_fits(choice, read_header(path).shapes, cfg)
        return path
    for name in files.names(files.ENCODER_FOLDER):
        path = files.path_of(files.ENCODER_FOLDER, name, node)
        try:
            encoders.check_fits(name, read_header(path).shapes, cfg)
        except ValueError:
            continue  # choosing the file by its name says what is wrong with it
        return path
    return None


@contextmanager
def named(node: str) -> Iterator[None]:
    """Puts the node's name in front of a core error about the user's input."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from None


def features(role: str, cfg: ClipConfig | DinoConfig, path: str | None, wired: Any, pictures: torch.Tensor, owner: dict) -> tuple[torch.Tensor, str]:
    """Encode prepared pictures (r, s, s, 3) -> CLIP [CLS] (r, width) or DINO patch tokens (r, p, width) on the CPU in float32.

    Also returns where the weights came from, for the report. A tower read from a file lives as long as `owner`, where it is noted.
    """
    if wired is not None:
        return _from_core(role, cfg, wired, pictures), f"{role} socket"
    if path is None:
        raise ValueError(_none_found(role, cfg))
    patcher = owner[role] = _patcher(cfg, path)
    mm.load_models_gpu([patcher], memory_required=_memory(pictures), force_full_load=True)
    return _forward(patcher.model, pictures), os.path.basename(path)


def _patcher(cfg: ClipConfig | DinoConfig, path: str) -> comfy.model_patcher.ModelPatcher:
    """open_clip's and timm's layers do not cast, so the tower is loaded whole and in one dtype, by a plain ModelPatcher."""
    load_device = mm.text_encoder_device()
    dtype = torch.float16 if mm.should_use_fp16(load_device) else torch.float32
    key = (path, os.stat(path).st_mtime_ns, repr(cfg), dtype)
    patcher = _loaded.get(key)
    if patcher is None:
        with named(NODE):
            tower = encoders.load_tower(cfg, path, dtype)
        patcher = comfy.model_patcher.ModelPatcher(tower, load_device=load_device, offload_device=mm.text_encoder_offload_device())
        _loaded[key] = patcher
    return patcher


def _from_core(role: str, cfg: ClipConfig | DinoConfig, clip_vision: Any, pictures: torch.Tensor) -> torch.Tensor:
    """A loaded core CLIP_VISION: run as it is at its own size, else its weights in our tower (the shared object stays as it is)."""
    weights = clip_vision.get_sd()
    with named(NODE):
        encoders.check_fits(f"The model on the {role} socket", {key: tuple(value.shape) for key, value in weights.items()}, cfg)
    if clip_vision.image_size == pictures.shape[1]:
        outputs = [clip_vision.encode_image(chunk, crop=False) for chunk in pictures.split(CHUNK)]
        if isinstance(cfg, ClipConfig):
            return torch.cat([out["image_embeds"].float().cpu() for out in outputs])
        skipped = 1 + encoders.wanted_shape(cfg).registers
        return torch.cat([out["last_hidden_state"][:, skipped:].float().cpu() for out in outputs])
    tower = encoders.from_core_clip_vision(weights, cfg).to(mm.text_encoder_device())  # belongs to this one run of the node
    return _forward(tower, pictures)


def _forward(tower: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        pixels = images.normalise(pictures, tower.mean, tower.std)
        return torch.cat([tower(chunk).float().cpu() for chunk in pixels.split(CHUNK)])


def _memory(pictures: torch.Tensor) -> int:
    """Activations of one chunk, generously: a ViT-H holds about 60 MB per 224 px picture in fp16."""
    return min(len(pictures), CHUNK) * pictures.shape[1] * pictures.shape[2] * 2048


def _none_found(role: str, cfg: ClipConfig | DinoConfig) -> str:
    seen = []
    for name in files.names(files.ENCODER_FOLDER):
        try:
            found = encoder_files.identify(read_header(files.path_of(files.ENCODER_FOLDER, name, NODE)))
            seen.append(f"{name} ({encoder_files.describe(found) if found else 'not an image encoder known here'})")
        except ValueError:
            seen.append(f"{name} (unreadable)")
    return (
        f"{NODE}: these adapters want {encoders.describe_model(cfg)}, and no file in {files.searched(files.ENCODER_FOLDER)} is one. "
        f"Looked at: {', '.join(seen) or 'no files at all'}. Put the encoder's file there, or wire a loaded one into {role}."
    )


