"""Where the mini world's models lie; reading them needs neither diffusers nor ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..files.weights import read_tensors, write_atomically
from .architecture import TEXT_WIDTH
from .text import TextEncoder

WEIGHTS = Path(__file__).parent / "weights"  # trained, shipped with the pack
BASE = "base.safetensors"  # unet.* in diffusers' names, text.*
CLIP_FILE = "clip.safetensors"  # visual.*, as open_clip saves an image tower
CLIP_TEXT = "clip_text.safetensors"  # the rest of it, which only scores need
DINO_FILE = "dino.safetensors"  # as timm saves it
JUDGE = "judge.safetensors"
ADAPTERS = "adapters.safetensors"  # a FlexIP checkpoint
IP_ADAPTER = "ip_adapter.safetensors"  # of equal size, trained on the same pairs, to compare with
SHIPPED = {"flexip": ("outputs-jitter", ADAPTERS), "ip": ("ip", IP_ADAPTER)}  # title -> named run of runs.py, its file


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    write_atomically(path, safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}))


def read_base(path: str | Path) -> tuple[dict[str, Tensor], TextEncoder]:
    """The UNet's tensors in float32, and the text encoder."""
    tensors = read_tensors(path)
    text = TextEncoder(TEXT_WIDTH)
    text.load_state_dict(part(tensors, "text."))
    return {key: value.float() for key, value in part(tensors, "unet.").items()}, text.eval().requires_grad_(False)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those under `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
