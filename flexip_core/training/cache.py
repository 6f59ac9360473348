"""What the frozen encoders say about training data, computed once and kept on disk in half precision.

It keeps latents (the mean that the VAE gives, scaled for the UNet: what Base.to_latents returns), texts, CLIP's [CLS] and, if
wanted, DINO's patch tokens; then the VAE, text encoder and image encoders need not be in memory. Without a cache, new references
are drawn for every batch; with one, each picture has a few fixed ones per kind (`fixed_cuts`), and nothing is mirrored.

The same call continues what was interrupted, and after a change of pictures, captions or encoders only what changed is computed
(entries.py). What is no longer needed stays in the folder; delete the folder to get rid of it.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .base import Base
from .choice import DEFAULTS, MEMORY, Choice, Loader, check_size
from .dataset import DataSet, View, phrases_of, scan
from .entries import KEPT, Contents, Entries, Memo, Names, check_identity, kinds_of, packed_place, place_name
from .pictures import CUTS, Cut, CutOptions, fixed_cuts, reference, target, target_place
from .ranks import TrainingError

SUBSETS = 16  # of a caption's phrases, at most; longer captions with dropped phrases are encoded while training
MOST_TEXTS = 20_000  # kept: 2.4 GB for SD1.5, 6.3 GB for SDXL; more of them are encoded while training
_SPARE = 1.02  # of the disk space, for headers


@dataclass
class Plan:
    """What `fill` will compute. Each job is done once, whatever needs it."""

    names: Names
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> phrases
    latents: dict[str, View] = field(default_factory=dict)
    features: dict[tuple[str, str], tuple[View, Cut]] = field(default_factory=dict)  # content, cut -> what to encode
    wanted: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)  # the same -> "cls", "patches" -> name
    kept: int = 0  # entries that are there already
    long_captions: int = 0  # whose phrases are too many to keep all subsets
    left_out: int = 0  # texts that are not kept, because there are too many

    @property
    def jobs(self) -> int:
        return len(self.texts) + len(self.latents) + len(self.features)


def plan(
    data: Iterable[DataSet],
    size: int,
    entries: Entries,
    identity: Mapping[str, str],
    patches: bool = False,
    drop_phrases: bool = False,
    options: CutOptions = DEFAULTS,
    cuts: int = CUTS,
    most_texts: int = MOST_TEXTS,
) -> Plan:
    """What is missing in the cache. Of more than `most_texts` texts none is kept: who encodes some while training has the encoders in
    memory anyway."""
    check_size(size)
    check_identity(identity)
    result = Plan(Names(size, identity))
    names, memo = result.names, Memo(entries.folder)

    def missing(name: str) -> bool:
        result.kept += name in entries
        return name not in entries

    if missing(names.text(())):
        result.texts[names.text(())] = ()
    for part in data:
        contents = Contents(part, size, memo)
        kinds = kinds_of(Choice(part))
        captions = set()
        for view in kinds:
            phrases = phrases_of(part.caption(view))
            if phrases not in captions:
                captions.add(phrases)
                result.long_captions += drop_phrases and 2 ** len(phrases) > SUBSETS
                for some in subsets(phrases) if drop_phrases else [phrases]:
                    if missing(names.text(some)):
                        result.texts[names.text(some)] = some
            content, masked = contents(view)
            if missing(names.latents(content)):
                result.latents[names.latents(content)] = view
            for cut in {cut: None for kind in sorted(kinds[view]) for cut in fixed_cuts(options, kind, masked, cuts)}:
                needed = {e: names.feature(e, content, cut) for e in ("cls", *(["patches"] if patches else []))}
                if needed := {entry: name for entry, name in needed.items() if missing(name)}:
                    result.features[content, repr(cut)] = view, cut
                    result.wanted[content, repr(cut)] = needed
    memo.save()
    if len(result.texts) > most_texts:
        empty = names.text(())
        result.left_out = len(result.texts) - (empty in result.texts)
        result.texts = {name: phrases for name, phrases in result.texts.items() if name == empty}
    return result


def subsets(phrases: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All that phrase dropout can leave of a caption, the whole one first; only that one if there are more than SUBSETS."""
    if 2 ** len(phrases) > SUBSETS:
        return [phrases]
    keep = itertools.product((True, False), repeat=len(phrases))
    return [tuple(itertools.compress(phrases, chosen)) for chosen in keep]


@dataclass(frozen=True)
class Filled:
    """What `fill` did, or would do."""

    computed: int  # jobs: a text, a picture's latents, a reference's features
    kept: int  # entries that were there already
    bytes: int  # of the new entries
    long_captions: int
    left_out: int = 0

    def text(self) -> str:
        long = (
            f" {self.long_captions} captions have more than {SUBSETS.bit_length() - 1} phrases; what dropout leaves of them is encoded "
            "while training."
        )
        too_many = (
            f" {self.left_out} texts are too many to keep (--texts raises it), so they are encoded while training."
        )
        return (
            f"{self.computed} texts and pictures to encode, {self.kept} entries already there, {self.bytes / 2**20:.1f} MB to write."
            + (long if self.long_captions else "")
            + (too_many if self.left_out else "")
        )


def fill(
    base: Base,
    data: str | os.PathLike,
    size: int,
    cache: str | os.PathLike,
    identity: Mapping[str, str],
    patches: bool = False,
    drop_phrases: bool = False,
    options: CutOptions = DEFAULTS,
    cuts: int = CUTS,
    batch: int = 8,
    workers: int | None = None,
    texts: int = MOST_TEXTS,
    on_start: Callable[[Filled], bool | None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Filled:
    """Computes what is missing, for train and val. An interrupted run loses nothing that was encoded.

    on_start gets what will be done before anything is written (False: it is not done). patches: DINO's, 512 KB per reference.
    drop_phrases: texts for everything that phrase dropout can leave; `texts`: how many may be kept. RuntimeError where the disk is too
    small.
    """
    entries = Entries(cache)
    sets = [scan(data, "train"), scan(data, "val")]
    todo = plan(sets, size, entries, identity, patches, drop_phrases, options, cuts, texts)
    loader = Loader(sets[0].store, size, MEMORY)
    encode = _Encoders(base, todo, loader, entries)
    about = Filled(todo.jobs, todo.kept, encode.measure(), todo.long_captions, todo.left_out)
    if on_start is not None and on_start(about) is False:
        return about
    _check_disk(Path(cache), about.bytes, patches)
    done = 0
    try:
        with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
            for count in encode.all(batch, pool):
                done += count
                if on_progress is not None:
                    on_progress(done, todo.jobs)
    finally:
        entries.flush()
    return about


def _check_disk(folder: Path, needed: int, patches: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed * _SPARE:
        raise TrainingError(
            f"Cache: {needed / 2**20:.0f} MB are needed in {folder}, {free / 2**20:.0f} MB are free; make room, choose another "
            f"folder, or keep fewer texts (--texts){' or no patches' if patches else ''}."
        )


class _Encoders:
    """Runs the base's encoders over a plan, one encoder after the other."""

    def __init__(self, base: Base, todo: Plan, loader: Loader, entries: Entries):
        self.base, self.todo, self.load, self.entries = base, todo, loader, entries

    def measure(self) -> int:
        """Bytes that all of it will take, told by encoding the first of each."""
        todo, total = self.todo, 0
        for jobs, encode in self._stages():
            if first := list(itertools.islice(jobs.items(), 1)):
                sizes = {name: value.numel() * KEPT.itemsize for name, value in encode(first, None)}
                if jobs is todo.features:
                    by_entry = self._feature_bytes(first[0][0], sizes)
                    total += sum(by_entry[entry] for names in todo.wanted.values() for entry in names)
                else:
                    total += sum(sizes.values()) * len(jobs)
                self._release()
        return total

    def _feature_bytes(self, job: tuple[str, str], sizes: dict[str, int]) -> dict[str, int]:
        found = {entry: sizes[name] for entry, name in self.todo.wanted[job].items()}
        every = {entry for names in self.todo.wanted.values() for entry in names}
        for key in self.todo.features:  # another reference may lack an entry that the first one has
            if every <= found.keys():
                break
            if lacking := self.todo.wanted[key].keys() - found.keys():
                more = dict(self._features([(key, self.todo.features[key])], None))
                found |= {entry: more[self.todo.wanted[key][entry]].numel() * KEPT.itemsize for entry in lacking}
        return found

    def all(self, batch: int, pool: ThreadPoolExecutor) -> Iterator[int]:
        for jobs, encode in self._stages():
            pending = iter(jobs.items())
            while some := list(itertools.islice(pending, batch)):
                for name, value in encode(some, pool):
                    self.entries.add(name, value)
                yield len(some)
            self._release()

    def _stages(self) -> tuple:
        todo = self.todo
        return (todo.texts, self._texts), (todo.latents, self._latents), (todo.features, self._features)

    def _release(self) -> None:
        """The next encoder gets the memory."""
        if hasattr(self.base, "release"):
            self.base.release()

    @torch.no_grad()
    def _texts(self, jobs: list, pool: ThreadPoolExecutor | None) -> Iterator[tuple[str, torch.Tensor]]:
        text = self.base.encode_text([phrases for _, phrases in jobs])
        for i, (name, _) in enumerate(jobs):
            yield name, text.tokens[i]
            if text.pooled is not None:
                yield f"{name}.pooled", text.pooled[i]

    @torch.no_grad()
    def _latents(self, jobs: list, pool: ThreadPoolExecutor | None) -> Iterator[tuple[str, torch.Tensor]]:
        size = self.todo.names.size
        made = _map(pool, lambda job: self._target(job[1], size), jobs)
        latents = self.base.to_latents(torch.stack([picture for picture, _ in made]))
        for (name, _), latent, (_, place) in zip(jobs, latents, made):
            yield name, latent
            yield place_name(name), packed_place(place)

    def _target(self, view: View, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        picture = self.load(view)
        return target(picture, size), target_place(picture, size)

    @torch.no_grad()
    def _features(self, jobs: list, pool: ThreadPoolExecutor | None) -> Iterator[tuple[str, torch.Tensor]]:
        size = self.todo.names.size
        pictures = _map(pool, lambda job: reference(self.load(job[1][0]), job[1][1], size), jobs)
        features = self.base.features(torch.stack(pictures))
        for i, (key, _) in enumerate(jobs):
            for entry, name in self.todo.wanted[key].items():
                yield name, features[entry][i]


def _map(pool: ThreadPoolExecutor | None, do: Callable, jobs: list) -> list:
    return list(map(do, jobs)) if pool is None else list(pool.map(do, jobs))
