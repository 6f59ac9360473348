"""Draws pictures with the gate: DDIM and classifier-free guidance, outside ComfyUI. For probes, previews and the mini world.

Shape legend: n pictures, c x h' x w' latent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from ..integrations.diffusers import BlockBranches, branches, gated
from ..network.adapters import ADAPTERS, FlexIPNetwork
from .base import Base, prediction_of
from .data import Captions

Dial = Callable[[float, float, str], float]
"""(gate, share of the sampling that is done, block address) -> the gate that this block has at this step."""


def everywhere(gate: float, done: float, block: str) -> float:
    return gate


@torch.no_grad()
def draw(
    base: Base,
    captions: Captions,
    noise: Tensor,
    network: FlexIPNetwork | None = None,
    features: dict[str, Tensor] | None = None,
    gate: float = 0.0,
    adapters: Iterable[str] = ADAPTERS,
    steps: int = 20,
    cfg: float = 7.0,
    dial: Dial = everywhere,
) -> Tensor:
    """n captions, noise (n, c, h', w'), features of n references -> pictures (n, 3, h, w) in -1..1.

    Without a network the bare base. The unconditional rows get the empty text and the null reference, as in ComfyUI.
    """
    n = len(captions)
    text = base.encode_text(captions).followed_by(base.empty_text().expand(n))
    both = {name: torch.cat([value, torch.zeros_like(value)]) for name, value in (features or {}).items()}
    half = next(base.unet.parameters()).dtype == torch.bfloat16

    @lru_cache
    def at(value: float) -> BlockBranches:
        return branches(network, both, text.tokens, (value,), adapters=adapters)

    def attached(done: float) -> contextlib.AbstractContextManager:
        if network is None:
            return contextlib.nullcontext()
        return gated(base.unet, {block: at(dial(gate, done, block))[block] for block in network.block_widths})

    def predicted(latents: Tensor, timestep: Tensor, done: float) -> Tensor:
        rows = torch.cat([latents, latents])
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=half), attached(done):
            out = base.unet(
                rows,
                timestep,
                encoder_hidden_states=text.tokens,
                added_cond_kwargs=base.added_conditions(text, rows),
                return_dict=False,
            )[0]
        positive, negative = out.float().chunk(2)
        return negative + cfg * (positive - negative)

    latents = noise.to(base.alphas_cumprod.device)
    return base.to_pictures(ddim(predicted, latents, base.alphas_cumprod, steps, prediction_of(base)))


def ddim(
    predicted: Callable[[Tensor, Tensor, float], Tensor],
    latents: Tensor,
    alphas_cumprod: Tensor,
    steps: int,
    prediction: str = "epsilon",
) -> Tensor:
    """`predicted(latents, timestep, share done)` is the noise in them, or v; from the last timestep down to none."""
    times = torch.linspace(len(alphas_cumprod) - 1, 0, steps + 1).round().long()[:-1].to(latents.device)
    kept = torch.cat([alphas_cumprod[times], alphas_cumprod.new_ones(1)])
    for number, (time, a, after) in enumerate(zip(times, kept, kept[1:])):
        out = predicted(latents, time, number / steps)
        if prediction == "epsilon":
            noise, clean = out, (latents - (1 - a).sqrt() * out) / a.sqrt()
        else:
            noise, clean = (a.sqrt() * out + (1 - a).sqrt() * latents, a.sqrt() * latents - (1 - a).sqrt() * out)
        latents = after.sqrt() * clean + (1 - after).sqrt() * noise
    return latents
