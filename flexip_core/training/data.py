"""Pairs of a reference and a target (paper section 3.4: what the gate learns to tell apart).

Variant data: two pictures of one subject, the reference is one and the target the other. Invariant data: the reference is made
from the target itself. Every draw comes from the generator that the loop gives, so a batch is a function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .config import DropoutConfig, TrainConfig

KINDS = ("invariant", "variant")
INVARIANT, VARIANT = range(len(KINDS))
ALL = slice(None)

Captions = torch.Tensor | list[tuple[str, ...]]
"""Captions as phrases, so that single phrases can be dropped: word ids (b, phrases) with 0 for "nothing said", or texts."""


@dataclass(frozen=True)
class Batch:
    targets: torch.Tensor  # (b, 3, h, w) in -1..1
    references: (
        Any  # what Base.features takes: pictures (b, 3, h, w) in -1..1, or indices into features computed before
    )
    captions: Captions  # of the targets
    kinds: torch.Tensor  # (b,) of INVARIANT or VARIANT, as asked for
    sizes: torch.Tensor | None = (
        None  # (b, 4): height and width of the whole picture, top and left of the target in it as it was scaled
    )


class PairSource(Protocol):
    @property
    def phrases(self) -> tuple[str, ...]:
        """What each phrase of a caption is about, by position; () if phrases have no fixed positions."""

    def views(self) -> Mapping[str, int]:
        """Subject of the variant data -> number of its pictures; each needs two."""

    def pictures(self) -> int:
        """How many pictures there are for invariant data."""

    def batch(self, kinds: torch.Tensor, generator: torch.Generator, rows: slice = ALL) -> Batch:
        """The `rows` of a batch with one row per entry of `kinds`. Draws from `generator` (on the CPU) and from nothing else.

        Everything is drawn for the whole batch, then only these rows are read and made: of several processes that train
        together each makes its own, and all of them together are the batch that one process would make.
        """


def drop_phrases(
    captions: Captions,
    phrases: tuple[str, ...],
    cfg: DropoutConfig,
    generator: torch.Generator,
    batch: int | None = None,
    rows: slice = ALL,
) -> Captions:
    """Every phrase of every caption is kept or dropped independently. `captions` are the `rows` of a batch of that many rows."""
    b = len(captions) if batch is None else batch
    if isinstance(captions, torch.Tensor):
        draws = torch.rand(b, captions.shape[1], generator=generator)[rows]
        return captions.masked_fill((draws < _rates(phrases, captions.shape[1], cfg)).to(captions.device), 0)
    longest = max(map(len, captions), default=0)
    # phrase by phrase, so that the draws do not depend on which of the batch's captions is the longest
    draws = torch.rand(longest, b, generator=generator).T[rows]
    gone = (draws < _rates(phrases, longest, cfg)).tolist()
    return [tuple(phrase for phrase, drop in zip(caption, row) if not drop) for caption, row in zip(captions, gone)]


def _rates(phrases: tuple[str, ...], count: int, cfg: DropoutConfig) -> torch.Tensor:
    names = [*phrases, *[""] * (count - len(phrases))]
    return torch.tensor([cfg.phrases.get(name, cfg.phrase) for name in names[:count]])


def check_source(source: PairSource, cfg: TrainConfig) -> None:
    """ValueError in one sentence for data that cannot be trained on as the config wants."""
    if strangers := sorted(set(cfg.dropout.phrases) - set(source.phrases)):
        raise ValueError(
            f"Training data: dropout.phrases names {strangers[0]!r}, but the captions have "
            f"{', '.join(source.phrases) or 'no named phrases'}; choose one of those."
        )
    if cfg.mix < 1 and not source.pictures():
        raise ValueError("Training data: there is no picture for invariant data; add pictures or set mix to 1.")
    if cfg.mix > 0:
        views = source.views()
        if not views:
            raise ValueError(
                "Training data: there is no subject for variant data; add subjects with at least two pictures each, "
                "or set mix to 0."
            )
        if lonely := [name for name, count in views.items() if count < 2]:
            raise ValueError(
                f"Training data: subject {lonely[0]!r} has one picture ({len(lonely)} of {len(views)} subjects do), "
                "and variant data needs at least two of each; add one or remove the subject."
            )
