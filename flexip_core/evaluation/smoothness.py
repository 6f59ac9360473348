"""How evenly a sweep of the gate moves: pure functions of curves.

Shape legend: g gates in rising order, n cases (one subject, one prompt, one noise each), f features.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-6


def spearman(curves: Tensor) -> Tensor:
    """(g,) or (g, n) -> rank correlation with the gate, () or (n,); 0 for a curve that does not move."""
    ranks = _ranks(curves.double())
    gates = torch.arange(len(curves), dtype=torch.float64).view(-1, *[1] * (curves.dim() - 1))
    gates, ranks = gates - gates.mean(0), ranks - ranks.mean(0)
    scale = gates.square().sum(0).sqrt() * ranks.square().sum(0).sqrt()
    return torch.where(scale > 0, (gates * ranks).sum(0) / scale.clamp(min=_FLOOR), 0.0)


def _ranks(curves: Tensor) -> Tensor:
    """Equal values share the mean of their ranks."""
    above = (curves.unsqueeze(1) > curves.unsqueeze(0)).sum(1)
    equal = (curves.unsqueeze(1) == curves.unsqueeze(0)).sum(1)
    return above + (equal.double() - 1) / 2


def jump_share(curve: Tensor) -> float:
    """Largest step of a mean curve (g,) as a share of its whole way; 1 / (g - 1) if it is straight."""
    way = (curve[-1] - curve[0]).abs()
    return ((curve[1:] - curve[:-1]).abs().max() / way.clamp(min=_FLOOR)).item()


def case_jump_share(curves: Tensor, least_range: float = 0.05) -> tuple[float, int]:
    """Mean over the cases of (g, n) of the largest step as a share of the range, and how many cases have that range at all.

    Shows flips that the mean curve hides. A case whose range is below `least_range` has nothing to share and is left out.
    """
    spread = curves.amax(0) - curves.amin(0)
    steps = (curves[1:] - curves[:-1]).abs().amax(0)
    moving = spread >= least_range
    if not moving.any():
        return 0.0, 0
    return (steps[moving] / spread[moving]).mean().item(), int(moving.sum())


def step_ratios(features: Tensor) -> Tensor:
    """(g, n, f) -> (n,): the largest step between neighbouring gates over the mean step, of each case; 1 if all are equal."""
    steps = (features[1:] - features[:-1]).norm(dim=-1)
    return steps.amax(0) / steps.mean(0).clamp(min=_FLOOR)


def largest_step_at(features: Tensor) -> Tensor:
    """(g, n, f) -> (n,): the number of the interval in which each case takes its largest step."""
    return (features[1:] - features[:-1]).norm(dim=-1).argmax(0)


def straightness(curve: Tensor) -> float:
    """R² of the mean curve (g,) against the best straight line."""
    x = torch.linspace(-1, 1, len(curve), dtype=torch.float64)
    y = curve.double() - curve.double().mean()
    rest = y - x * (x @ y) / (x @ x)
    return (1 - rest.square().sum() / y.square().sum().clamp(min=_FLOOR)).item()
