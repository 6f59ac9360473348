"""Scores of generated pictures: how close to a reference (CLIP-I, DINO-I), how close to the prompt (CLIP-T).

All are cosines of encoder outputs. Several references, or several views of one, count equally: the mean over all pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..pictures.plots import Series, line_plot

CLIP_I, DINO_I, CLIP_T = "CLIP-I", "DINO-I", "CLIP-T"
PANEL = (560, 300)  # pixels


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(n, d), (r, d) -> (n, r), the cosine of every pair; 0 where one of the two is 0, and nearly so below a length of 1e-12."""
    return (normalize(a.double(), dim=1) @ normalize(b.double(), dim=1).t()).clamp(-1, 1)  # 1.0000000000000002


def image_scores(generated: Tensor, reference: Tensor) -> Tensor:
    """Features (n, d) of the pictures and (r, d) of the reference -> (n,): the mean cosine over the reference's pictures."""
    if not len(reference):
        raise ValueError("There is no reference picture to compare with; connect at least one.")
    return cosine(generated, reference).mean(1)


@dataclass(frozen=True)
class Score:
    """One kind of score. With `values`, one per picture, `note` says what they can be compared with; without, why there are none."""

    name: str
    values: tuple[float, ...] = ()
    model: str = ""
    note: str = ""

    @property
    def available(self) -> bool:
        return bool(self.values)

    @property
    def unavailable(self) -> str:
        """The sentence that stands in place of the values."""
        return f"not available: {self.note}"


def missing(name: str, why: str) -> Score:
    return Score(name, note=why)


@dataclass(frozen=True)
class AtGate:
    """The scores of the pictures that were sampled with one gate."""

    gate: float
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the pictures (n - 1); 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def by_gate(values: Sequence[float], gates: Sequence[float]) -> list[AtGate]:
    """Gate-major values, as FlexIPSampler returns its pictures: first all with the first gate, then with the second, ...

    A gate that stands twice among `gates` gets the values of both places.
    """
    each, left = divmod(len(values), len(gates))
    if left or not each:
        raise ValueError(
            f"got {len(values)} images for {len(gates)} gates; expected the same number of images for every gate, "
            "as FlexIP Sampler gives them. Correct the gates, or leave them empty."
        )
    found: dict[float, tuple[float, ...]] = {}
    for i, gate in enumerate(gates):
        found[gate] = found.get(gate, ()) + tuple(values[i * each : (i + 1) * each])
    return [AtGate(gate, own) for gate, own in found.items()]


def report(scores: Sequence[Score], gates: Sequence[float] = ()) -> str:
    """Everything in words: the means (a node on the page shows two or three lines), then what made them, then every gate or picture."""
    found = [score for score in scores if score.available]
    count = len(found[0].values) if found else 0
    means = ", ".join(
        f"{s.name} {f'{statistics.fmean(s.values):.3f}' if s.available else 'not available'}" for s in scores
    )
    lines = [f"{means}{f' (means of {count} images)' if count > 1 else ''}.", *map(_details, scores)]
    if found and gates:
        for row in zip(*(by_gate(score.values, gates) for score in found)):
            cells = [_cell(score.name, at) for score, at in zip(found, row)]
            lines.append(f"gate {row[0].gate:g}: {', '.join(cells)}.")
    elif found:
        for number in range(count):
            cells = [f"{score.name} {score.values[number]:.3f}" for score in found]
            lines.append(f"image {number + 1}: {', '.join(cells)}.")
    return "\n".join(lines)  # every line is a sentence, because the page's new nodes show line breaks as spaces


def _details(score: Score) -> str:
    if not score.available:
        return f"{score.name} {score.unavailable}"
    extent = f": {min(score.values):.3f} to {max(score.values):.3f}" if len(score.values) > 1 else ""
    return f"{score.name} by {score.model}{extent}. {score.note}"


def _cell(name: str, at: AtGate) -> str:
    if len(at.values) == 1:
        return f"{name} {at.mean:.3f}"
    return f"{name} {at.mean:.3f} ± {at.spread:.3f} ({', '.join(f'{value:.3f}' for value in at.values)})"


def plot(scores: Sequence[Score], gates: Sequence[float] = ()) -> Tensor | None:
    """Scores over the gate, or over the picture's number: (1, h, w, 3) in 0..1; None if there is no score.

    CLIP-T has a panel of its own: its cosines are a third of the others', so that a common axis would flatten all.
    """
    found = [score for score in scores if score.available]
    panels = [[s for s in found if s.name != CLIP_T], [s for s in found if s.name == CLIP_T]]
    titles = ("closeness to the reference", "closeness to the prompt")
    drawn = [
        line_plot(
            [_series(score, gates) for score in panel],
            x_label="gate" if gates else "image",
            y_label=" and ".join(score.name for score in panel),
            title=title,
            size=PANEL,
            x_range=(0.0, 1.0) if gates else None,
        )
        for panel, title in zip(panels, titles)
        if panel
    ]
    return torch.cat(drawn, dim=1) if drawn else None


def _series(score: Score, gates: Sequence[float]) -> Series:
    if not gates:
        return Series(score.name, tuple(range(1, len(score.values) + 1)), score.values, points=True)
    points = sorted(by_gate(score.values, gates), key=lambda at: at.gate)
    spread = [(at.mean - at.spread, at.mean + at.spread) for at in points]
    return Series(
        score.name,
        [at.gate for at in points],
        [at.mean for at in points],
        spread if any(len(at.values) > 1 for at in points) else None,
        points=True,
    )
