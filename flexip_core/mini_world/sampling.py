"""How the mini world draws its pictures: the trainer's sampler, with the world's steps and guidance."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..training import sampling
from ..training.sampling import Dial, ddim, everywhere
from .architecture import LATENT_CHANNELS
from .world import SIZE

__all__ = ["CFG", "STEPS", "Dial", "ddim", "draw", "everywhere", "noise_for"]

STEPS, CFG = 20, 2.0
draw = partial(sampling.draw, steps=STEPS, cfg=CFG)


def noise_for(n: int, seed: int) -> Tensor:
    """(n, 12, 8, 8)"""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, LATENT_CHANNELS, SIZE // 2, SIZE // 2, generator=g)
