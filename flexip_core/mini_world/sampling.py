"""Draws pictures with the gate: DDIM and classifier-free guidance, outside ComfyUI."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from ..adapters import ADAPTERS, FlexIPNetwork
from ..integrations.diffusers import Branches, branches, gated
from .architecture import LATENT_CHANNELS
from .base import MiniBase
from .world import SIZE

STEPS, CFG = 20, 2.0
Dial = Callable[[float, float, str], float]
"""(gate, share of the sampling that is done, block address) -> the gate that this block has at this step."""


def everywhere(gate: float, done: float, block: str) -> float:
    return gate


def noise_for(n: int, seed: int) -> Tensor:
    """(n, 12, 8, 8)"""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, LATENT_CHANNELS, SIZE // 2, SIZE // 2, generator=g)


@torch.no_grad()
def draw(
    base: MiniBase,
    captions: Tensor,
    noise: Tensor,
    network: FlexIPNetwork | None = None,
    features: dict[str, Tensor] | None = None,
    gate: float = 0.0,
    adapters: Iterable[str] = ADAPTERS,
    steps: int = STEPS,
    cfg: float = CFG,
    dial: Dial = everywhere,
) -> Tensor:
    """Captions (n, 4), noise (n, 12, 8, 8), features of n references -> pictures (n, 3, 16, 16) in -1..1.

    Without a network the bare base. The unconditional rows get the empty text and the null reference, as in ComfyUI.
    """
    n = len(captions)
    text = torch.cat([base.encode_text(captions), base.empty_text().expand(n, -1, -1)])
    both = {name: torch.cat([value, torch.zeros_like(value)]) for name, value in (features or {}).items()}

    @lru_cache
    def at(value: float) -> Branches:
        return branches(network, both, text, (value,), adapters=adapters)

    def attached(done: float) -> contextlib.AbstractContextManager:
        if network is None:
            return contextlib.nullcontext()
        return gated(base.unet, {block: at(dial(gate, done, block))[block] for block in network.block_widths})

    def predicted(latents: Tensor, timestep: Tensor, done: float) -> Tensor:
        rows = torch.cat([latents, latents])
        with attached(done):
            out = base.unet(rows, timestep, encoder_hidden_states=text, return_dict=False)[0]
        positive, negative = out.chunk(2)
        return negative + cfg * (positive - negative)

    return base.to_pictures(ddim(predicted, noise.to(base.device), base.alphas_cumprod, steps))


def ddim(
    predicted: Callable[[Tensor, Tensor, float], Tensor], latents: Tensor, alphas_cumprod: Tensor, steps: int
) -> Tensor:
    """`predicted(latents, timestep, share done)` is the noise in them; from the last timestep down to none."""
    times = torch.linspace(len(alphas_cumprod) - 1, 0, steps + 1).round().long()[:-1].to(latents.device)
    kept = torch.cat([alphas_cumprod[times], alphas_cumprod.new_ones(1)])
    for number, (time, a, after) in enumerate(zip(times, kept, kept[1:])):
        noise = predicted(latents, time, number / steps)
        clean = (latents - (1 - a).sqrt() * noise) / a.sqrt()
        latents = after.sqrt() * clean + (1 - after).sqrt() * noise
    return latents
