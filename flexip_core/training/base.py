"""What the trainer needs of a frozen base model, and how a config names what it trains on.

Shape legend: b batch, t text tokens, w text width, p patch tokens, h x w pixels, c x h' x w' latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn

from ..adapters import FlexIPNetwork
from ..config import ClipConfig, DinoConfig
from .data import Captions, PairSource


class Base(Protocol):
    """A frozen diffusion model that predicts the noise, its text encoder and the two encoders of references.

    Everything is on the device of `alphas_cumprod`. No method draws random numbers. The trainer calls the methods under
    no_grad and turns off the UNet's gradients itself.
    """

    name: str  # becomes FlexIPConfig.base
    unet: nn.Module  # diffusers' UNet2DConditionModel
    text_width: int
    clip: ClipConfig  # the encoders whose features `features` gives, as they stand in the checkpoint
    dino: DinoConfig
    alphas_cumprod: torch.Tensor  # (timesteps,), float32, falling

    def encode_text(self, captions: Captions) -> torch.Tensor:
        """(b, t, w); `captions` as the PairSource gives them, phrases possibly dropped."""

    def empty_text(self) -> torch.Tensor:
        """(1, t, w), the same t: what stands for "no text"."""

    def to_latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) in -1..1 -> (b, c, h', w'), scaled as the UNet expects them."""

    def to_pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back, clipped to -1..1."""

    def features(self, references: Any) -> dict[str, torch.Tensor]:
        """Batch.references -> "cls" (b, clip width) and "patches" (b, p, dino width); zeros stand for "no reference"."""


Probe = Callable[[FlexIPNetwork], Mapping[str, float]]
"""Scores the averaged weights on fixed seeds. The entry "score" (larger is better) decides which checkpoint is the best."""


class Task(NamedTuple):
    """What a config's `[task] make = "module:function"` returns; the function gets `device` and the table's other entries."""

    base: Base
    source: PairSource
    probe: Probe | None = None
