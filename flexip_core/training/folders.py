"""Pairs out of training data: what a batch shows is drawn first (choice.py), then decoded in threads and cut."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from .choice import DEFAULTS, MEMORY, Choice, Loader, Redraw, check_size
from .data import ALL, Batch
from .dataset import DataSet, phrases_of
from .pictures import CUT_DRAWS, CutOptions, draw_cut, reference, target, target_place

Row = tuple[torch.Tensor, torch.Tensor, tuple[str, ...], torch.Tensor]
"""Target, reference, caption, and where the target was cut out."""


class FolderPairs:
    """PairSource over a data set: decodes what a batch needs, in threads. Captions are split into phrases at commas.

    `flip`: chance that a row is mirrored, target and reference together.
    """

    phrases: tuple[str, ...] = ()

    def __init__(
        self,
        data: DataSet,
        size: int,
        options: CutOptions = DEFAULTS,
        flip: float = 0.0,
        workers: int | None = None,
        memory: int = MEMORY,
    ):
        check_size(size)
        self.data, self.size, self.options, self.flip = data, size, options, flip
        self.choice = Choice(data)
        self.load = Loader(data.store, size, memory)
        self._readable = Redraw(self.choice.files())
        self._workers = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), "pictures")

    def views(self) -> dict[str, int]:
        return self.choice.views()

    def pictures(self) -> int:
        return self.choice.pictures()

    def batch(self, kinds: torch.Tensor, generator: torch.Generator, rows: slice = ALL) -> Batch:
        draws = torch.rand(len(kinds), 3 + CUT_DRAWS + 1, generator=generator, dtype=torch.float64)
        kinds = kinds[rows]
        made = list(self._workers.map(self.row, kinds.tolist(), draws[rows].tolist()))
        targets, references, captions, places = zip(*made) if made else ((), (), (), ())
        return Batch(torch.stack(targets), torch.stack(references), list(captions), kinds, torch.stack(places))

    def row(self, kind: int, draws: list[float]) -> Row:
        return self._readable(lambda draws: self._row(kind, draws), draws)

    def _row(self, kind: int, draws: list[float]) -> Row:
        shown, other = self.choice(kind, draws[:3])
        flip = draws[-1] < self.flip
        picture = self.load(shown)
        source = picture if other is shown else self.load(other)
        cut = draw_cut(self.options, kind, source.mask is not None, draws[3:-1])
        return (
            target(picture, self.size, flip),
            reference(source, cut, self.size, flip),
            phrases_of(self.data.caption(shown)),
            target_place(picture, self.size, flip),
        )
