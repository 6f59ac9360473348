"""Values over a picture as colours."""

from __future__ import annotations

import torch

# matplotlib's "inferno" at equal distances: even steps in lightness, also for the colour-blind
_INFERNO = (
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (186, 54, 85),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)


def heat(values: torch.Tensor) -> torch.Tensor:
    """(..., h, w) in 0..1 -> (..., h, w, 3): dark is 0, light yellow is 1."""
    table = torch.tensor(_INFERNO, dtype=torch.float32) / 255
    place = values.clamp(0, 1) * (len(table) - 1)
    below = place.long().clamp_max(len(table) - 2)
    return torch.lerp(table[below], table[below + 1], (place - below).unsqueeze(-1))


def overlay(pictures: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Pictures (b, h, w, 3), maps (b, h, w) in 0..1 -> the heat over the picture in grey, denser where it is higher."""
    grey = pictures @ torch.tensor([0.299, 0.587, 0.114])
    return torch.lerp(grey.unsqueeze(-1), heat(values), 0.5 + 0.35 * values.clamp(0, 1).unsqueeze(-1))
