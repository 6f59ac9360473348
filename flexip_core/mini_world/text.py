"""The tiny text encoder: one transformer layer over the four words of a caption."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from . import world


class TextEncoder(nn.Module):
    """Captions (b, 4) of word numbers -> tokens (b, 4, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.words = nn.Embedding(world.VOCABULARY, width)
        self.slots = nn.Parameter(torch.randn(len(world.SLOTS), width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, captions: Tensor) -> Tensor:
        return self.norm(self.layer(self.words(captions) + self.slots))
