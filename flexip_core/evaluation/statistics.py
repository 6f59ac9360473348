"""Means over pictures, and how far they would move with other subjects.

Pictures of one subject resemble each other, so the interval resamples subjects, never single pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from ..measuring.scores_file import Row

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    mean: float  # over the pictures, as the papers average
    std: float | None  # of the pictures, with n - 1; None for a single picture
    low: float | None  # 95 % bootstrap interval of the mean over subjects; None for a single subject
    high: float | None
    images: int
    subjects: int


def summarize(rows: Iterable[Row], column: str) -> Summary:
    """ValueError if a row has no such score: a mean of some pictures is not that of all."""
    by_subject: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        score = row.scores.get(column)
        if score is None or not np.isfinite(score):
            raise ValueError(f"{row.subject}, prompt {row.case}, image {row.image} has no {column}; score again.")
        by_subject[row.subject].append(score)
    if not by_subject:
        raise ValueError(f"There are no pictures to average {column} over.")
    scores = np.concatenate([np.asarray(values, dtype=np.float64) for values in by_subject.values()])
    sums = np.array([sum(values) for values in by_subject.values()], dtype=np.float64)
    counts = np.array([len(values) for values in by_subject.values()], dtype=np.float64)
    low, high = interval(sums, counts)
    std = float(scores.std(ddof=1)) if len(scores) > 1 else None
    return Summary(float(scores.mean()), std, low, high, len(scores), len(sums))


def interval(
    sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float] | tuple[None, None]:
    """sums, counts (s,) of each subject's scores -> percentile interval of sum / count under resampled subjects.

    A resample draws s subjects with replacement, each with all its pictures.
    """
    if len(sums) < 2:
        return None, None
    draws = _draws(len(sums), resamples, seed)  # (r, s)
    means = (draws @ sums) / (draws @ counts)  # (r,)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Of two methods on the same pictures: first minus second."""

    mean: float
    low: float | None  # paired 95 % bootstrap interval over subjects; None for a single subject
    high: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def difference(first: Sequence[Row], second: Sequence[Row], column: str) -> Difference:
    """Every resample holds the same subjects for both methods, so what makes a subject hard for both cancels.

    ValueError unless both have the same subjects, prompts and images.
    """
    ours, theirs = (
        {(row.subject, row.case, row.image): row.scores[column] for row in rows} for rows in (first, second)
    )
    if not ours or ours.keys() != theirs.keys():
        raise ValueError(
            f"A difference of {column} needs the same pictures of both methods; score both on the same cases."
        )
    by_subject: dict[str, list[float]] = defaultdict(list)
    for key, score in ours.items():
        by_subject[key[0]].append(score - theirs[key])
    sums = np.array([sum(values) for values in by_subject.values()])
    counts = np.array([len(values) for values in by_subject.values()], dtype=np.float64)
    low, high = interval(sums, counts)
    return Difference(float(sums.sum() / counts.sum()), low, high)


@lru_cache(maxsize=16)
def _draws(subjects: int, resamples: int, seed: int) -> np.ndarray:
    """(r, s): how often each resample holds each subject. The same for all columns, so they can be read together."""
    return np.random.default_rng(seed).multinomial(subjects, np.full(subjects, 1 / subjects), size=resamples)


def by_category(rows: Sequence[Row], column: str) -> dict[str, Summary]:
    return _by(rows, column, lambda row: row.category)


def by_gate(rows: Sequence[Row], column: str) -> dict[float | None, Summary]:
    """In rising order of the gate."""
    return _by(rows, column, lambda row: row.gate)


def _by(rows: Sequence[Row], column: str, key: Callable[[Row], Any]) -> dict[Any, Summary]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return {name: summarize(groups[name], column) for name in sorted(groups, key=lambda name: (name is not None, name))}


def real_against_real(features: Mapping[str, Tensor]) -> Summary:
    """Features (n, d) of each subject's real pictures -> the cosine of two different pictures of one subject.

    Mean over a subject's pairs first, then over subjects: DreamBooth says "average pairwise", not how subjects with 4 and
    6 pictures count, and no public code of this row was found. Subjects with one picture have no pair and are left out.
    `images` counts pictures, std is that of the subjects.
    """
    usable = {
        subject: normalize(pictures.double(), dim=-1) for subject, pictures in features.items() if len(pictures) > 1
    }
    if not usable:
        raise ValueError("Real against real needs a subject with at least two different pictures.")
    means = np.array([_mean_pair(pictures) for pictures in usable.values()])
    low, high = interval(means, np.ones(len(means)))
    std = float(means.std(ddof=1)) if len(means) > 1 else None
    return Summary(float(means.mean()), std, low, high, sum(map(len, usable.values())), len(means))


def _mean_pair(pictures: Tensor) -> float:
    """(n, d) of length 1 -> mean cosine over the n (n - 1) / 2 pairs."""
    n = len(pictures)
    cosines = pictures @ pictures.T  # (n, n)
    return ((cosines.sum() - cosines.trace()) / (n * (n - 1))).item()
