"""The one building block of FlexIP's adapters: latents as queries, context as keys and values (paper Fig. 3, panels A-C).

Keys and values see context and latents together, as in the Perceiver resampler of Flamingo; with the context alone, a
context of one token would make the softmax constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from .attention import attention
from .config import ResamplerConfig


class ResamplerLayer(nn.Module):
    """Cross-attention and feed-forward, each with a residual; pre-norm."""

    def __init__(self, cfg: ResamplerConfig, operations: Any = nn, **factory: Any):
        super().__init__()
        inner = cfg.heads * cfg.dim_head
        self.heads = cfg.heads
        self.norm_latents = operations.LayerNorm(cfg.width, **factory)
        self.norm_context = operations.LayerNorm(cfg.width, **factory)
        self.to_q = operations.Linear(cfg.width, inner, bias=False, **factory)
        self.to_k = operations.Linear(cfg.width, inner, bias=False, **factory)
        self.to_v = operations.Linear(cfg.width, inner, bias=False, **factory)
        self.to_out = operations.Linear(inner, cfg.width, bias=False, **factory)
        self.norm_ff = operations.LayerNorm(cfg.width, **factory)
        self.ff_in = operations.Linear(cfg.width, cfg.width * cfg.ff_mult, bias=False, **factory)
        self.ff_out = operations.Linear(cfg.width * cfg.ff_mult, cfg.width, bias=False, **factory)

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q = self.norm_latents(latents)
        kv = torch.cat([self.norm_context(context), q], dim=1)
        latents = latents + self.to_out(attention(self.to_q(q), self.to_k(kv), self.to_v(kv), self.heads))
        return latents + self.ff_out(nn.functional.gelu(self.ff_in(self.norm_ff(latents))))


class Resampler(nn.Module):
    """`depth` layers between a projection of the context and one of the result.

    forward(latents (b, n, width), context (b, m, context_width)) -> tokens (b, n, out_width)
    """

    def __init__(self, cfg: ResamplerConfig, context_width: int, out_width: int, operations: Any = nn, **factory: Any):
        super().__init__()
        self.context_in = operations.Linear(context_width, cfg.width, **factory)
        self.layers = nn.ModuleList(ResamplerLayer(cfg, operations, **factory) for _ in range(cfg.depth))
        self.out = operations.Linear(cfg.width, out_width, **factory)
        self.norm_out = operations.LayerNorm(out_width, **factory)

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        context = self.context_in(context)
        for layer in self.layers:
            latents = layer(latents, context)
        return self.norm_out(self.out(latents))
