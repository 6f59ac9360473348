"""The three image projections of public IP-Adapter files: a CLIP feature -> tokens (tencent-ailab/IP-Adapter, ip_adapter.py, resampler.py).

Shape legend: r reference pictures, n tokens of the feature.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from .config import ResamplerConfig
from .resampler import Resampler


class PlainProjection(nn.Module):
    """One linear layer makes all tokens of the embedding (ImageProjModel)."""

    def __init__(self, width: int, out_width: int, tokens: int, operations: Any = nn):
        super().__init__()
        self.tokens = tokens
        self.proj = operations.Linear(width, tokens * out_width)
        self.norm = operations.LayerNorm(out_width)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """(r, width) -> (r, tokens, out_width)"""
        return self.norm(self.proj(embedding).unflatten(1, (self.tokens, -1)))


class PlusProjection(nn.Module):
    """Learned queries resample the penultimate tokens: our own Resampler under other names."""

    def __init__(self, cfg: ResamplerConfig, width: int, out_width: int, tokens: int, operations: Any = nn):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, tokens, cfg.width))
        self.resampler = Resampler(cfg, width, out_width, operations)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(r, n, width) -> (r, tokens, out_width)"""
        return self.resampler(self.latents.to(hidden).expand(hidden.shape[0], -1, -1), hidden)


class FullProjection(nn.Module):
    """A small MLP on every penultimate token (MLPProjModel)."""

    def __init__(self, width: int, out_width: int, operations: Any = nn):
        super().__init__()
        self.proj_in = operations.Linear(width, width)
        self.proj_out = operations.Linear(width, out_width)
        self.norm = operations.LayerNorm(out_width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(r, n, width) -> (r, n, out_width)"""
        return self.norm(self.proj_out(nn.functional.gelu(self.proj_in(hidden))))
