"""Where the world's models lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch.nn as nn
from torch import Tensor

from ..files.weights import read_tensors, write_atomically

DRAWINGS = "drawings.npz"
CODEC = "codec.safetensors"
JUDGE = "judge.safetensors"
CLIP_FILE = "clip.safetensors"  # visual.*, as open_clip saves an image tower
CLIP_TEXT = "clip_text.safetensors"  # the rest of it, which only scores need
CLIP_STATE = "clip_state.safetensors"
DINO_FILE = "dino.safetensors"  # as timm saves it
BASE = "base.safetensors"  # unet.* in diffusers' names, text.*
BASE_AVERAGE = "base_average.safetensors"  # of a training that goes on, in half precision
BASE_STATE = "base_state.safetensors"
JUDGE_STATE = "judge_state.safetensors"

Model = TypeVar("Model", bound=nn.Module)


def save(tensors: Mapping[str, Tensor], path: Path, half: bool = False) -> None:
    """`half`: in half precision, the same to the eye and half as large."""
    kept = {key: (value.half() if half else value).cpu().contiguous() for key, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(kept))


def load(model: Model, path: Path) -> Model:
    """`model` with the file's weights, frozen. ValueError if there is no such file yet."""
    return with_weights(model, read(path))


def read(path: Path) -> dict[str, Tensor]:
    """ValueError if there is no such file yet."""
    if not path.is_file():
        raise ValueError(f"There is no {path} yet; run the command that makes it first (scripts/characters.py --help).")
    return read_tensors(path)


def with_weights(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    model.load_state_dict({key: value.float() for key, value in tensors.items()})
    return model.eval().requires_grad_(False)
