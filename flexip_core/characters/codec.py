"""Latents without a VAE: the principal components of small patches. Linear, both ways, and nothing to train.

Shape legend: n pictures (n, 3, SIZE, SIZE) in -1..1, latents (n, CHANNELS, GRID, GRID).
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .architecture import CHANNELS, GRID, PATCH
from .render import SIZE

EVENING = (
    0.75  # power of its deviation that a component is divided by: nearly whitened, but coarse parts outlive more noise
)


class Codec(nn.Module):
    """`Codec.learned(pictures)`, or an empty one to load a state dict into."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        values = 3 * PATCH**2
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(values, channels))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("weights", torch.ones(channels))  # of the channels in the base's loss; their mean is 1

    @classmethod
    def learned(cls, pictures: Tensor, channels: int = CHANNELS) -> Codec:
        codec = cls(channels)
        rows = patches(pictures).flatten(0, 1)
        mean = rows.mean(0)
        variance, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        variance, directions = variance.flip(0)[:channels], directions.flip(1)[:, :channels]
        scale = variance.sqrt() ** EVENING
        scale = scale * (variance / scale.square()).mean().sqrt()  # latents have variance 1 over all channels
        weights = variance**0.25
        codec.load_state_dict(
            {"mean": mean, "basis": directions.contiguous(), "scale": scale, "weights": weights / weights.mean()}
        )
        return codec

    def encode(self, pictures: Tensor) -> Tensor:
        rows = (patches(pictures) - self.mean) @ self.basis / self.scale
        return rows.movedim(1, 2).unflatten(2, (GRID, GRID))

    def decode(self, latents: Tensor) -> Tensor:
        """Not clipped."""
        rows = (latents.flatten(2).movedim(1, 2) * self.scale) @ self.basis.T + self.mean
        return F.fold(rows.movedim(1, 2), SIZE, PATCH, stride=PATCH)


def patches(pictures: Tensor) -> Tensor:
    """(n, GRID * GRID, 3 * PATCH * PATCH)"""
    return F.unfold(pictures, PATCH, stride=PATCH).movedim(1, 2)
