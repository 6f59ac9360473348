"""Training on what `cache.fill` has kept: a source of kept features, and a base that takes them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .base import Base, Text
from .choice import DEFAULTS, MEMORY, Choice, Loader, Redraw, check_size
from .data import ALL, INVARIANT, VARIANT, Batch, Captions
from .dataset import DataSet, part_of, phrases_of
from .entries import KEPT, Contents, Entries, Memo, Names, check_identity, kinds_of, place_name, unpacked_place
from .pictures import CUTS, CutOptions, fixed_cuts, reference

Row = tuple[torch.Tensor, tuple[str, ...], dict[str, torch.Tensor], torch.Tensor | None]
"""Latents, caption, what is kept of the reference (its picture where patches are not), and where the target was cut out."""


class CachedSource:
    """PairSource whose batches hold what was kept: latents, and features by name; use it with CachedBase.

    Without kept patches a batch carries the references' pictures for the patch encoder. ValueError where entries are missing.
    """

    phrases: tuple[str, ...] = ()

    def __init__(
        self,
        data: DataSet,
        size: int,
        cache: str | os.PathLike | Entries,
        identity: Mapping[str, str],
        options: CutOptions = DEFAULTS,
        cuts: int = CUTS,
        workers: int | None = None,
        memory: int = MEMORY,
    ):
        check_size(size)
        check_identity(identity)
        self.data, self.size, self.names = data, size, Names(size, identity)
        self.entries = cache if isinstance(cache, Entries) else Entries(cache)
        self.choice = Choice(data)
        self._cuts = {
            (kind, masked): fixed_cuts(options, kind, masked, cuts)
            for kind in (INVARIANT, VARIANT)
            for masked in (False, True)
        }
        memo = Memo(self.entries.folder)
        self._contents = Contents(data, size, memo)
        self.patches = self._check()
        memo.save()
        self.load = Loader(data.store, size, memory)
        self._readable = Redraw(self.choice.files())
        self._workers = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), "pictures")

    def _check(self) -> bool:
        """Whether patches are kept, all of them; ValueError if anything else is missing."""
        missing, total, patches = [], 0, True
        for view, kinds in kinds_of(self.choice).items():
            content, masked = self._contents(view)
            needed = [self.names.latents(content)]
            for cut in {cut for kind in kinds for cut in self._cuts[kind, masked]}:
                needed.append(self.names.feature("cls", content, cut))
                patches = patches and self.names.feature("patches", content, cut) in self.entries
            total += 1
            if not all(name in self.entries for name in needed):
                missing.append(view.name)
        if missing:
            raise ValueError(
                f"Cache: {len(missing)} of {total} pictures are new or changed since the cache in {self.entries.folder} was made, "
                f"or its encoders or size were others (such as {missing[0]}); run `cache` again."
            )
        return patches

    def views(self) -> dict[str, int]:
        return self.choice.views()

    def pictures(self) -> int:
        return self.choice.pictures()

    def batch(self, kinds: torch.Tensor, generator: torch.Generator, rows: slice = ALL) -> Batch:
        draws = torch.rand(len(kinds), 4, generator=generator, dtype=torch.float64)
        kinds = kinds[rows]
        made = list(self._workers.map(self._row, kinds.tolist(), draws[rows].tolist()))
        latents, captions, references, places = zip(*made)
        stacked = {name: torch.stack([own[name] for own in references]) for name in references[0]}
        known = [place for place in places if place is not None]  # a cache of an older version has none
        sizes = torch.stack(known) if len(known) == len(places) else None
        return Batch(torch.stack(latents), stacked, list(captions), kinds, sizes)

    def _row(self, kind: int, draws: list[float]) -> Row:
        return self._readable(lambda draws: self._made(kind, draws), draws)

    def _made(self, kind: int, draws: list[float]) -> Row:
        shown, other = self.choice(kind, draws[:3])
        content, masked = self._contents(other)
        cuts = self._cuts[kind, masked]
        cut = cuts[int(draws[3] * len(cuts))]
        kept = ("cls", "patches") if self.patches else ("cls",)
        own = {entry: self.entries[self.names.feature(entry, content, cut)] for entry in kept}
        if not self.patches:
            own["pictures"] = reference(self.load(other), cut, self.size)
        latents = self.names.latents(self._contents(shown)[0])
        place = place_name(latents)
        where = unpacked_place(self.entries[place]) if place in self.entries else None
        return self.entries[latents], phrases_of(self.data.caption(shown)), own, where


class CachedBase:
    """A base that reads what was kept and asks the encoders only for the rest; a real base loads them only then.

    `base` may have a method `patches` (pictures -> DINO's patch tokens), which avoids running CLIP where only those are missing.
    """

    def __init__(self, base: Base, entries: Entries, identity: Mapping[str, str]):
        check_identity(identity)
        self.base, self.entries, self.names = base, entries, Names(0, identity)
        self._told = False

    def __getattr__(self, name: str) -> Any:
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def to_latents(self, pictures: torch.Tensor) -> torch.Tensor:
        if pictures.dtype != KEPT:
            return self.base.to_latents(pictures)
        return pictures.to(self.base.alphas_cumprod.device).float()

    def features(self, references: Any) -> dict[str, torch.Tensor]:
        if isinstance(references, torch.Tensor):
            return self.base.features(references)
        device = self.base.alphas_cumprod.device
        found = {name: value.to(device).float() for name, value in references.items() if name != "pictures"}
        if "pictures" in references:
            pictures = references["pictures"]
            alone = getattr(self.base, "patches", None)
            found["patches"] = alone(pictures) if alone else self.base.features(pictures)["patches"]
        return found

    def encode_text(self, captions: Captions) -> Text:
        names = [self.names.text(caption) for caption in captions]
        if missing := [i for i, name in enumerate(names) if name not in self.entries]:
            if not self._told:
                self._told = True
                logging.info(
                    "Cache: texts are encoded while training, because not all are kept (such as %r).",
                    ", ".join(captions[missing[0]]),
                )
            return self.base.encode_text(captions)
        device = self.base.alphas_cumprod.device
        tokens = torch.stack([self.entries[name] for name in names]).to(device).float()
        if f"{names[0]}.pooled" not in self.entries:
            return Text(tokens)
        return Text(tokens, torch.stack([self.entries[f"{name}.pooled"] for name in names]).to(device).float())

    def empty_text(self) -> Text:
        return self.encode_text([()])


def cached(
    base: Base,
    data: str | os.PathLike | DataSet,
    size: int,
    cache: str | os.PathLike,
    identity: Mapping[str, str],
    part: str = "train",
    **options: Any,
) -> tuple[CachedBase, CachedSource]:
    """Base and source for the trainer, over what `fill` has kept."""
    source = CachedSource(part_of(data, part), size, cache, identity, **options)
    return CachedBase(base, source.entries, identity), source
