"""Gates that are more than one number: over the sampling (GateCurve) and over the batch (GateBatch).

A curve runs over the part of the sampling, 0 at pure noise and 1 at the finished picture, as start_percent and end_percent do.
PercentOfSigma finds that part from the sigma of a model call, so that a curve means the same for every sampler and step count.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .lists import SEPARATORS

SWITCH = (0.4, 0.6)  # where "identity first" and "style first" change over
GRID = tuple(i / 100 for i in range(101))


@dataclass(frozen=True)
class GateCurve:
    """The gate over the sampling: straight lines through points (percent, gate), constant before the first and after the last."""

    points: tuple[tuple[float, float], ...]
    name: str

    def __post_init__(self) -> None:
        percents = [percent for percent, _ in self.points]
        if not percents:
            raise ValueError(f"the gate curve {self.name!r} has no points; give it at least one.")
        if not all(before < after for before, after in itertools.pairwise(percents)):
            raise ValueError(f"the gate curve {self.name!r} goes back in time: its percents must rise, got {percents}.")
        for percent, gate in self.points:
            if not (0.0 <= percent <= 1.0 and 0.0 <= gate <= 1.0):
                raise ValueError(
                    f"the gate curve {self.name!r} leaves 0 to 1 at the point ({percent:g}, {gate:g}); percent and gate both lie between 0 and 1."
                )

    def __call__(self, percent: float) -> float:
        percents, gates = zip(*self.points)
        gate = float(np.interp(percent, percents, gates))
        return min(1.0, max(0.0, gate))  # interpolation may be off by a rounding


def _switch(percent: float) -> float:
    return _smooth(min(1.0, max(0.0, (percent - SWITCH[0]) / (SWITCH[1] - SWITCH[0]))))


def _smooth(t: float) -> float:
    return t * t * (3 - 2 * t)


def _ease_in_out(t: float) -> float:
    return 4 * t**3 if t < 0.5 else 1 - 4 * (1 - t) ** 3


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda percent: 0.0,
    "identity first": _switch,
    "style first": _switch,
    "linear": lambda percent: percent,
    "ease in": lambda percent: percent**3,
    "ease out": lambda percent: 1 - (1 - percent) ** 3,
    "ease in-out": _ease_in_out,
}
"""How far a preset has gone from the first value to the second, over the part of the sampling."""
PRESETS = tuple(SHAPES)


def preset_curve(preset: str, start: float, end: float) -> GateCurve:
    """One of PRESETS from gate `start` to gate `end`.

    "constant" stays at start. "linear" and the three eases go from start to end: "ease in" leaves slowly, "ease out" arrives
    slowly, "ease in-out" does both. "identity first" and "style first" hold one value for 40 % of the sampling, change over within
    20 % and hold the other; they order the two values themselves, the higher gate first or the lower one.
    """
    if preset == "identity first":
        start, end = max(start, end), min(start, end)
    elif preset == "style first":
        start, end = min(start, end), max(start, end)
    shape = SHAPES[preset]
    name = f"{preset} {start:g}" if preset == "constant" else f"{preset}, {start:g} to {end:g}"
    return GateCurve(tuple((p, start * (1 - shape(p)) + end * shape(p)) for p in GRID), name)


SPREADS = ("interpolate", "repeat")


@dataclass(frozen=True)
class GateBatch:
    """The gate over the batch, for any batch size.

    "repeat": the values in turn, as ComfyUI repeats a short batch. "interpolate": the values are key frames at equal distances
    from the first latent to the last, with straight lines between them.
    """

    values: tuple[float, ...]
    spread: str

    def __post_init__(self) -> None:
        if not self.values or not all(0.0 <= value <= 1.0 for value in self.values):
            raise ValueError(f"the gates of a batch must be one or more numbers from 0 to 1, got {self.values}.")
        if self.spread not in SPREADS:
            raise ValueError(f"spread must be one of {', '.join(SPREADS)}, got {self.spread!r}.")

    def values_for(self, batch: int) -> tuple[float, ...]:
        """One gate per latent; a single latent gets the first value."""
        if self.spread == "repeat":
            return tuple(self.values[row % len(self.values)] for row in range(batch))
        places = np.linspace(0, len(self.values) - 1, batch)
        return tuple(float(gate) for gate in np.interp(places, range(len(self.values)), self.values).clip(0.0, 1.0))


class PercentOfSigma:
    """The part of the sampling at which a sigma is reached: the inverse of ComfyUI's model_sampling.percent_to_sigma.

    A table of 1001 points, interpolated in log sigma. At its two ends percent_to_sigma answers with "before everything"
    (999999999.9 for some models) and 0; the table takes the limits there, so that the model's largest sigma is 0, its smallest 1,
    and what is beyond stays at 0 and 1.
    """

    def __init__(self, percent_to_sigma: Callable[[float], float]):
        self.percents = np.linspace(0.0, 1.0, 1001)
        sigmas = np.array([float(percent_to_sigma(float(p))) for p in self.percents.clip(1e-9, 1 - 1e-9)])
        self.largest, self.smallest = sigmas[0], sigmas[-1]
        # rising, also where a model's rule has a plateau or its float32 wobbles
        self.falling_logs = np.maximum.accumulate(-np.log(sigmas))

    def __call__(self, sigma: float) -> float:
        if sigma >= self.largest:
            return 0.0
        if sigma <= self.smallest:
            return 1.0
        return float(np.interp(-math.log(sigma), self.falling_logs, self.percents))


MOST_NUMBERS = 4096


def parse_numbers(text: str, low: float, high: float, what: str, most: int = MOST_NUMBERS) -> tuple[float, ...]:
    """ "0, 0.25 1" -> (0.0, 0.25, 1.0); empty text -> (). `what` begins the message of an error: "FlexIPSampler: gates"."""
    values = []
    for word in filter(None, re.split(rf"[{SEPARATORS}\s]+", text)):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(
                f"{what} must be numbers from {low:g} to {high:g} with commas between them, such as {low:g}, {(low + high) / 2:g}, {high:g}; got {word!r}."
            )
        values.append(value)
    if len(values) > most:
        raise ValueError(f"{what} has {len(values)} numbers, but at most {most} are possible. Use fewer.")
    return tuple(values)
