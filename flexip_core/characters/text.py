"""The text encoder: two transformer layers over the words of a caption."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from .words import SLOTS, VOCABULARY

LAYERS = 2


class TextEncoder(nn.Module):
    """Captions (n, slots) of word numbers -> tokens (n, slots, width)."""

    def __init__(self, width: int, layers: int = LAYERS):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.words.weight, std=0.5)
        self.slots = nn.Parameter(torch.randn(len(SLOTS), width) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, captions: Tensor) -> Tensor:
        tokens = self.words(captions) + self.slots
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)
