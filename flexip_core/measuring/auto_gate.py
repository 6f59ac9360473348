"""Finds the smallest gate that keeps enough identity, from a few short runs: pure functions on measured scores.

A score curve is measured for several noises. The gate asked for is where the mean curve first reaches the target; how far the
curves of the single noises disagree says how sure that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIRST_ROUND = (0.0, 0.25, 0.5, 0.75, 1.0)
FINER = 3  # gates of the second round, inside the interval where the mean crosses the target


@dataclass(frozen=True)
class Found:
    """The answer and how sure it is. `gate` is 1 where the target is out of reach, 0 where every gate reaches it."""

    gate: float
    reached: bool
    lowest: float  # where the curves of the single noises reach the target: the first of them ...
    highest: float  # ... and the last; 1 where one of them never does
    never: int  # noises that reach it at no gate
    step: float  # distance of the measured gates around the answer: between them it is a straight line


def crossing(gates: Sequence[float], scores: Sequence[float], target: float) -> float | None:
    """The smallest gate whose score reaches `target`, straight lines between the measured gates; None if none does."""
    for number, score in enumerate(scores):
        if score >= target:
            if number == 0:
                return gates[0]
            low, before = gates[number - 1], scores[number - 1]
            return low + (gates[number] - low) * (target - before) / (score - before)
    return None


def second_round(gates: Sequence[float], scores: np.ndarray, target: float) -> tuple[float, ...]:
    """Gates to measure next: evenly inside the interval where the mean of scores (noises, gates) crosses. () without a crossing."""
    mean = scores.mean(axis=0)
    gate = crossing(gates, mean, target)
    if gate is None or gate <= gates[0]:
        return ()
    number = int(np.searchsorted(gates, gate, side="left"))
    low, high = gates[number - 1], gates[number]
    return tuple(low + (high - low) * (i + 1) / (FINER + 1) for i in range(FINER))


def find_gate(gates: Sequence[float], scores: np.ndarray, target: float) -> Found:
    """From scores (noises, gates), gates rising."""
    gate = crossing(gates, scores.mean(axis=0), target)
    single = [crossing(gates, row, target) for row in scores]
    reached = [value for value in single if value is not None]
    answer = gates[-1] if gate is None else gate
    number = min(max(int(np.searchsorted(gates, answer, side="left")), 1), len(gates) - 1)
    return Found(
        gate=answer,
        reached=gate is not None,
        lowest=min(reached, default=gates[-1]),
        highest=gates[-1] if len(reached) < len(single) else max(reached),
        never=len(single) - len(reached),
        step=gates[number] - gates[number - 1],
    )


def as_score(target: float, scores: np.ndarray) -> float:
    """A target given as a share of the reachable range: 0 is the mean score at the first gate, 1 the best mean score."""
    mean = scores.mean(axis=0)
    return float(mean[0] + target * (mean.max() - mean[0]))
