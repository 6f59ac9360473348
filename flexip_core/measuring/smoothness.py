"""How evenly a sweep of the gate moves: pure functions of curves.

Shape legend: g gates in rising order, n cases (one subject, one prompt, one noise each), f features.

A step is what a sweep does while the gate moves by one place. `places` (g,) says where the gates stand; without it they are one
place apart, and steps are those between neighbours. On any other grid a step may begin anywhere, and between two gates a curve is
taken to be straight. So a grid that is refined somewhere cannot make a jump there look smaller: what was a step before still is one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FLOOR = 1e-6
_TINY = 1e-12


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


def interpolated(values: Tensor, places: Tensor, at: Tensor) -> Tensor:
    """values (g, ...) of the gates at `places` (g,) -> (len(at), ...), straight between them and constant beyond the ends"""
    right = torch.searchsorted(places, at, right=True).clamp(1, len(places) - 1)
    share = ((at - places[right - 1]) / (places[right] - places[right - 1])).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], share.to(values.dtype).view(-1, *[1] * (values.dim() - 1)))


def steps(
    values: Tensor, places: Tensor | None = None, far: Callable[[Tensor], Tensor] = torch.abs
) -> tuple[Tensor, Tensor]:
    """values (g, ...) -> where steps begin (s,) and how `far` each goes (s, ...): every step that begins or ends on a gate.

    Among the steps of a piecewise straight curve the largest is one of these.
    """
    places = _one_apart(values) if places is None else places.double()
    begins = torch.cat([places, places - 1]).unique()
    begins = begins[(begins > places[0] - _TINY) & (begins < places[-1] - 1 + 1e-9)]
    if not len(begins):
        raise ValueError(f"The gates span {(places[-1] - places[0]).item():g} places, less than one step.")
    # one after the other: features of a whole benchmark at both ends of all steps would be gigabytes
    ways = [far(interpolated(values, places, b + 1) - interpolated(values, places, b)) for b in begins.split(1)]
    return begins, torch.cat(ways)


def _one_apart(values: Tensor) -> Tensor:
    return torch.arange(len(values), dtype=torch.float64)


def jump_share(curve: Tensor, places: Tensor | None = None) -> float:
    """Largest step of a mean curve (g,) as a share of its whole way; 1 / (g - 1) if it is straight and `places` are one apart."""
    way = (curve[-1] - curve[0]).abs()
    return (steps(curve, places)[1].max() / way.clamp(min=_FLOOR)).item()


def case_jump_share(curves: Tensor, least_range: float = 0.05, places: Tensor | None = None) -> tuple[float, int]:
    """Mean over the cases of (g, n) of the largest step as a share of the range, and how many cases have that range at all.

    Shows flips that the mean curve hides. A case whose range is below `least_range` has nothing to share and is left out.
    """
    spread = curves.amax(0) - curves.amin(0)
    largest = steps(curves, places)[1].amax(0)
    moving = spread >= least_range
    if not moving.any():
        return 0.0, 0
    return (largest[moving] / spread[moving]).mean().item(), int(moving.sum())


def step_ratios(features: Tensor, places: Tensor | None = None) -> Tensor:
    """(g, n, f) -> (n,): the largest step over the mean step, of each case; 1 if all are equal.

    The mean is that of steps end to end from the first gate on, which more gates in between do not change.
    """
    places = _one_apart(features) if places is None else places.double()
    largest = steps(features, places, _length)[1].amax(0)
    end_to_end = interpolated(features, places, torch.arange(places[0], places[-1] + 1e-9, dtype=torch.float64))
    return largest / _length(end_to_end[1:] - end_to_end[:-1]).mean(0).clamp(min=_FLOOR)


def _length(features: Tensor) -> Tensor:
    return features.norm(dim=-1)


def largest_step_at(features: Tensor) -> Tensor:
    """(g, n, f) -> (n,): the number of the interval in which each case takes its largest step."""
    return (features[1:] - features[:-1]).norm(dim=-1).argmax(0)


def straightness(curve: Tensor, places: Tensor | None = None) -> float:
    """R² of the mean curve (g,) against the best straight line; each gate counts for the stretch that it stands for."""
    x, y = (_one_apart(curve) if places is None else places.double()), curve.double()
    gaps = x[1:] - x[:-1]
    weights = (torch.cat([gaps[:1], gaps]) + torch.cat([gaps, gaps[-1:]])) / 2  # equal on an even grid
    weights = weights / weights.sum()
    x, y = x - weights @ x, y - weights @ y
    rest = y - x * ((weights * x) @ y) / ((weights * x) @ x)
    return (1 - weights @ rest.square() / (weights @ y.square()).clamp(min=_TINY)).item()
