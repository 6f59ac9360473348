"""What a batch shows: views drawn from training data, and the pictures behind them, decoded once and kept."""

from __future__ import annotations

import logging
import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch

from .data import KINDS, VARIANT
from .dataset import DataSet, View
from .pictures import (
    DECODING,
    MORE_THAN_SIZE,
    CutOptions,
    Picture,
    decode_frame,
    decode_mask,
    decode_picture,
    pixels_of,
    reduced,
)
from .stores import Store

TRIES = 16  # draws for one row
FEW, SHARE = 3, 0.01  # damaged files that a run bears: so many, or that share of all
Row = TypeVar("Row")
MEMORY = 2 * 2**30  # bytes of decoded pictures that are kept
DEFAULTS = CutOptions()


class Loader:
    """Decodes views, keeps the most recently used ones, and may be called from many threads."""

    def __init__(self, store: Store, size: int, memory: int = MEMORY):
        self.store, self.size, self.memory = store, size, memory
        self._kept: OrderedDict[tuple[str, int | None], Picture] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, view: View) -> Picture:
        key = (view.file, view.frame)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        picture = load(self.store, view, self.size)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = picture
                self._bytes += picture.bytes
                while self._bytes > self.memory and len(self._kept) > 1:
                    self._bytes -= self._kept.popitem(last=False)[1].bytes
        return picture


def load(store: Store, view: View, size: int) -> Picture:
    """A view no larger than targets of `size` need. ValueError, one sentence, naming what cannot be read."""
    at_least = None if view.frame is not None else MORE_THAN_SIZE * size
    with store.open(view.file) as file, DECODING.held(pixels_of(file, view.file, at_least)):
        if view.frame is not None:
            return reduced(decode_frame(file, view.file, view.frame, view.frames), None, size)
        found = decode_picture(file, view.file, at_least)
        mask = found.alpha
        if view.mask is not None:
            with store.open(view.mask) as mask_file:
                mask = decode_mask(mask_file, view.mask, found.size)
        return reduced(found.rgb, mask, size, found.size)


class Choice:
    """Which views a batch shows: drawn for the whole batch, from the same number of draws whatever comes out.

    Subjects are drawn by the square root of their number of views, times their weight. Invariant pictures are drawn equally often, times the
    weight of their folder; where there are no loose ones, those of the subjects serve, subject by subject.
    """

    def __init__(self, data: DataSet):
        self.subjects = [group for group in data.subjects if group.weight > 0]
        loose = [group for group in data.loose if group.weight > 0]
        self.loose = loose or self.subjects
        self.shares = _cumulative([group.weight * len(group.views) ** 0.5 for group in self.subjects])
        self.loose_shares = _cumulative([group.weight * len(group.views) for group in loose]) if loose else self.shares

    def views(self) -> dict[str, int]:
        return {group.name.rpartition("/")[2]: len(group.views) for group in self.subjects}

    def pictures(self) -> int:
        return sum(len(group.views) for group in self.loose)

    def files(self) -> int:
        return len({view.file for group in (*self.subjects, *self.loose) for view in group.views})

    def __call__(self, kind: int, draws: list[float]) -> tuple[View, View]:
        """Target and reference from three numbers in 0..1."""
        variant = kind == VARIANT
        groups, shares = (self.subjects, self.shares) if variant else (self.loose, self.loose_shares)
        if not groups:
            raise ValueError(f"Training data: there is nothing for {KINDS[kind]} pairs; add pictures or change mix.")
        views = groups[
            int(torch.searchsorted(shares, draws[0] * shares[-1], right=True).clamp(max=len(groups) - 1))
        ].views
        first = int(draws[1] * len(views))
        if not variant:
            return views[first], views[first]
        return views[first], views[(first + 1 + int(draws[2] * (len(views) - 1))) % len(views)]


class Redraw:
    """Makes rows of a batch, and draws a row again where a picture in it cannot be read, so that one file does not end a run.

    What is drawn instead depends on the row's draws alone: the other rows stay as they are, and a resumed run draws the same.
    """

    def __init__(self, files: int):
        self.most = max(FEW, int(SHARE * files))
        self.damaged: set[str] = set()  # what was said of each
        self._lock = threading.Lock()

    def __call__(self, make: Callable[[list[float]], Row], draws: list[float]) -> Row:
        """`make` the row from draws. Its own error where nothing can be read; ValueError where too many files are damaged."""
        again = random.Random(repr(draws))
        for _ in range(TRIES):
            try:
                return make(draws)
            except (ValueError, OSError) as error:
                failed = error
                self._count(str(error))
            draws = [again.random() for _ in draws]
        raise failed

    def _count(self, said: str) -> None:
        with self._lock:
            if said in self.damaged:
                return
            self.damaged.add(said)
            number = len(self.damaged)
        if number > self.most:
            raise ValueError(
                f"{number} files of the training data could not be read, more than {self.most}; the last: {said} The command `check` "
                "names them all."
            )
        logging.warning("%s Another one is drawn in its place (%d of at most %d such files).", said, number, self.most)


def _cumulative(weights: list[float]) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).cumsum(0)


def check_size(size: int) -> None:
    if type(size) is not int or size < 8 or size % 8:
        raise ValueError(f"Training data: size must be a multiple of 8 pixels, got {size!r}.")
