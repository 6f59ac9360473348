"""The pictures of a sweep by gate and case, and the curves that their scores draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measuring.scores_file import Row, Scores

TENTHS = 10
LEAST_GATES = 3


@dataclass(frozen=True)
class Columns:
    """The three scores that are measured: how far the text is followed, and how similar picture and reference are."""

    text: str = "CLIP-T"
    image: str = "CLIP-I"
    subject: str = "DINO-I"

    def names(self) -> tuple[str, str, str]:
        return self.text, self.image, self.subject


PRIMARY = Columns()
SECOND = Columns("CLIP-T (L/14)", "CLIP-I (L/14)", "DINO-I (DINOv2)")


class Curves:
    """The rows of a sweep by gate and case. g gates, n cases."""

    def __init__(self, scores: Scores, columns: Columns = PRIMARY):
        """ValueError, naming them, if pictures are missing or there twice."""
        rows = [(number, row) for number, row in enumerate(scores.rows) if row.gate is not None]
        self.scores, self.columns, self.gates = scores, columns, scores.gates
        self.knob = str(scores.header.get("knob", "gate"))
        if len(self.gates) < LEAST_GATES:
            raise ValueError(
                f"{scores.method} was scored at {len(self.gates)} gates; how evenly it controls needs a sweep of 11."
            )
        self.cases = tuple(sorted({case_of(row) for _, row in rows}))
        self.subjects = tuple(sorted({row.subject for _, row in rows}))
        at = {(row.gate, case_of(row)): number for number, row in rows}
        if len(at) != len(rows):
            raise ValueError(f"{scores.method} has {len(rows) - len(at)} pictures twice: same case, same {self.knob}.")
        missing = [(gate, case) for gate in self.gates for case in self.cases if (gate, case) not in at]
        if missing:
            names = [f"{subject}, {case!r}, image {image} at {gate:g}" for gate, (subject, case, image) in missing]
            more = f", and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{scores.method} lacks {'; '.join(names[:5])}{more}. Generate and score them first.")
        self.rows = torch.tensor([[at[gate, case] for case in self.cases] for gate in self.gates])  # (g, n)
        gates = torch.tensor(self.gates, dtype=torch.float64)
        self.places = (gates - gates[0]) / (gates[-1] - gates[0]) * TENTHS

    def of(self, column: str) -> Tensor:
        """(g, n); LookupError with the reason if that was not measured."""
        values = [self.scores.rows[i].scores.get(column, math.nan) for i in self.rows.flatten().tolist()]
        curves = torch.tensor(values, dtype=torch.float64).view(self.rows.shape)
        if curves.isnan().all():
            raise LookupError(self.scores.missing.get(column, f"{column} was not scored."))
        if not curves.isfinite().all():
            number = int((~curves.isfinite()).sum())
            raise ValueError(f"{self.scores.method} has no {column} of {number} pictures; score it again.")
        return curves

    def features(self) -> Tensor:
        """(g, n, f)"""
        if self.scores.features is None:
            raise LookupError("The file of scores came without DINO features; they are kept where DINO-I is measured.")
        return self.scores.features[self.rows].float()

    def gate_at(self, place: float) -> float:
        return self.gates[0] + (self.gates[-1] - self.gates[0]) * place / TENTHS

    def between(self, place: float, end: float) -> str:
        return f"{self.knob} {self.gate_at(place):.3g} to {self.gate_at(end):.3g}"


def case_of(row: Row) -> tuple[str, str, int]:
    return row.subject, row.case, row.image
