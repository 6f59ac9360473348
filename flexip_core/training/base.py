"""What the trainer needs of a frozen base model, and how a config names what it trains on.

Shape legend: b batch, t text tokens, w text width, v pooled width, p patch tokens, h x w pixels, c x h' x w' latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn

from ..network.adapters import FlexIPNetwork
from ..network.config import ClipConfig, DinoConfig
from .data import Captions, PairSource


class Text(NamedTuple):
    """Encoded captions."""

    tokens: torch.Tensor  # (b, t, w)
    pooled: torch.Tensor | None = None  # (b, v), what SDXL reads in addition

    def replaced(self, rows: torch.Tensor, other: Text) -> Text:
        """With `other` (one text, or one per row) in those `rows` (b,), bool."""
        return self._both(
            other, lambda own, new: torch.where(rows.view(-1, *[1] * (own.dim() - 1)).to(own.device), new, own)
        )

    def followed_by(self, other: Text) -> Text:
        """The rows of both."""
        return self._both(other, lambda own, new: torch.cat([own, new]))

    def expand(self, rows: int) -> Text:
        """One text, repeated for that many rows."""
        return self._both(self, lambda own, _: own.expand(rows, *own.shape[1:]))

    def _both(self, other: Text, how: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Text:
        return Text(*(None if own is None else how(own, new) for own, new in zip(self, other)))


class Base(Protocol):
    """A frozen diffusion model, its text encoder and the two encoders of references.

    Everything is on the device of `alphas_cumprod`. No method draws random numbers. The trainer calls the methods under
    no_grad and turns off the UNet's gradients itself.
    """

    name: str  # becomes FlexIPConfig.base
    unet: nn.Module  # diffusers' UNet2DConditionModel
    text_width: int
    clip: ClipConfig  # the encoders whose features `features` gives, as they stand in the checkpoint
    dino: DinoConfig
    alphas_cumprod: torch.Tensor  # (timesteps,), float32, falling
    # and, unless it predicts the noise, prediction = "v"

    def encode_text(self, captions: Captions) -> Text:
        """b texts; `captions` as the PairSource gives them, phrases possibly dropped."""

    def empty_text(self) -> Text:
        """One text with as many tokens: what stands for "no text"."""

    def added_conditions(
        self, text: Text, latents: torch.Tensor, sizes: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor] | None:
        """What the UNet reads besides the text tokens (diffusers' added_cond_kwargs) for b texts and latents; None without.

        `sizes`: Batch.sizes; None: pictures as large as the latents, neither scaled nor cropped.
        """

    def to_latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) in -1..1 -> (b, c, h', w'), scaled as the UNet expects them."""

    def to_pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back, clipped to -1..1."""

    def features(self, references: Any) -> dict[str, torch.Tensor]:
        """Batch.references -> "cls" (b, clip width) and "patches" (b, p, dino width); zeros stand for "no reference"."""


def prediction_of(base: Base) -> str:
    """ "epsilon" or "v"."""
    return getattr(base, "prediction", "epsilon")


Probe = Callable[[FlexIPNetwork, int], Mapping[str, float]]
"""(averaged weights, steps done) -> scores on fixed seeds. The entry "score" (larger is better) decides which checkpoint is the best."""


class Task(NamedTuple):
    """What a config's `[task] make = "module:function"` returns; the function gets `device` and the table's other entries."""

    base: Base
    source: PairSource
    probe: Probe | None = None
    validation: PairSource | None = None  # never trained on
