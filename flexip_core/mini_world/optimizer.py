"""The learning rate that the small trainings of this package share."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn as nn


def learning_rate(peak: float, step: int, steps: int, warm: int = 100) -> float:
    """Rises over `warm` steps and falls along a cosine to a twentieth."""
    return peak * min(1.0, (step + 1) / warm) * max(0.05, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def warm_cosine(
    parameters: Iterable[nn.Parameter], peak: float, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(1.0, step, steps))
