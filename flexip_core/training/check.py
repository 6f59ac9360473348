"""What is wrong with training data, before a run finds out: sentences and counts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from ..files.weights import sha256
from .data import KINDS
from .dataset import PARTS, DataSet, Group, View, open_store, scan
from .pictures import (
    DECODING,
    PICTURES,
    MaskMisfit,
    decode_frame,
    decode_mask,
    decode_picture,
    pixels_of,
    reduced,
    subject_box,
    target,
)

TOKENS = 77  # of a CLIP text encoder, begin and end included
HASH = 16  # a perceptual hash compares that many neighbours each way
ALIKE = 10  # of the hash's 256 bits may differ between pictures that look the same
COSINE = 0.97  # of CLIP embeddings: from here on two views show no variation
BLOCK = 256  # views that are compared with all others at a time
EXAMPLES = 3  # names in a sentence
# pictures and films that people have and that are not decoded
UNREAD = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".gif", ".apng", ".svg", ".psd", ".exr", ".tga", ".ico"),
    *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".wmv", ".flv", ".mpg", ".mpeg", ".3gp"),
)
ABOUT = ("credits", "license", "licence", "readme")  # files about the whole, beside variant/ and invariant/


@dataclass(frozen=True)
class Problem:
    level: str  # "error": training refuses it or learns something wrong; "warning"; "note"
    kind: str
    sentence: str
    names: tuple[str, ...]  # all that it concerns


@dataclass
class Report:
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings may be intended."""
        return not any(problem.level == "error" for problem in self.problems)

    def text(self) -> str:
        c = self.counts
        lines = [
            (
                f"{c['subjects']} subjects with {c['variant views']} views ({c['clips']} clips), {c['loose pictures']} loose pictures; "
                f"{c['masks']} masks; {c['captions']} captions of their own, {c['class captions']} from a class, {c['empty captions']} empty. "
                f"For validation {c['val subjects']} subjects and {c['val loose pictures']} loose pictures."
            )
        ]
        if "smallest side" in c:
            lines.append(f"The smallest picture's shorter side has {c['smallest side']} pixels.")
        lines += [f"{problem.level.capitalize()}: {problem.sentence}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "Nothing is wrong."])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok,
            "counts": self.counts,
            "problems": [vars(p) | {"names": list(p.names)} for p in self.problems],
        }


@dataclass
class _Seen:
    """What looking at one view found out."""

    group: Group
    view: View
    error: str | None = None
    side: int = 0
    pixels: bytes = b""  # digest
    look: np.ndarray | None = None  # perceptual hash
    embedding: torch.Tensor | None = None
    masked: bool = False
    empty_mask: bool = False


def check(
    data: str | os.PathLike,
    size: int,
    tokens: int = TOKENS,
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Decodes everything. ValueError only for what is not a data set at all.

    embed: pictures (1, 3, size, size) in -1..1 -> CLIP embeddings (1, width); finds near duplicates instead of the hash.
    on_progress: views looked at, and how many there are; also called repeatedly while that number stands still, so that
    raising there ends the check soon, whatever it is doing.
    """
    done, total = 0, 1

    def alive() -> None:
        if on_progress is not None:
            on_progress(done, total)

    store = open_store(data)
    broken: dict[str, str] = {}
    train, val = (scan(store, part, broken, alive) for part in PARTS)
    report = Report()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        seen = []
        jobs = [(part, group, view) for part in (train, val) for group, view in part.views()]
        total = len(jobs)
        for result in pool.map(lambda job: _look(*job, size, embed), jobs):
            seen.append(result)
            done = len(seen)
            alive()
    digests = _digests(store, [entry.view for entry in seen], alive)
    _count(report, train, val, seen)
    problems = [
        *_files(seen, broken, size),
        *_masks(seen),
        *_captions(train, tokens, report, alive),
        *_duplicates(train, seen, digests, alive),
        *_structure(train, val),
    ]
    order = {"error": 0, "warning": 1, "note": 2}
    report.problems = sorted(problems, key=lambda problem: order[problem.level])
    return report


def _look(data: DataSet, group: Group, view: View, size: int, embed) -> _Seen:
    seen = _Seen(group, view)
    try:
        with data.store.open(view.file) as file, DECODING.held(pixels_of(file, view.file)):
            _see(seen, file, data, size, embed)
    except (ValueError, RuntimeError) as error:
        seen.error = str(error)
    return seen


def _see(seen: _Seen, file: BinaryIO, data: DataSet, size: int, embed) -> None:
    view = seen.view
    if view.frame is not None:
        rgb, mask = decode_frame(file, view.file, view.frame, view.frames), None
    else:
        found = decode_picture(file, view.file)
        rgb, mask = found.rgb, found.alpha
    if view.mask is not None:
        with data.store.open(view.mask) as mask_file:
            try:
                mask = decode_mask(mask_file, view.mask, rgb.size)
            except MaskMisfit as error:
                seen.error, mask = str(error), None
    seen.side = min(rgb.size)
    seen.masked, seen.empty_mask = mask is not None, mask is not None and subject_box(mask) is None
    pixels = hashlib.sha256(repr(rgb.size).encode())
    pixels.update(np.asarray(rgb))
    seen.pixels = pixels.digest()
    seen.look = perceptual_hash(rgb)
    if embed is not None:
        with torch.no_grad():
            embedding = embed(target(reduced(rgb, None, size), size).unsqueeze(0))[0].float().cpu()
        seen.embedding = embedding / embedding.norm()


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """(HASH * HASH,) of bool: whether brightness rises from each of HASH x (HASH + 1) patches to its right neighbour."""
    small = image.convert("L").resize((HASH + 1, HASH), Image.Resampling.BOX)
    values = np.asarray(small).astype(np.int16)
    return (values[:, 1:] > values[:, :-1]).ravel()


def _digests(store, views: Iterable[View], alive: Callable[[], None]) -> dict[str, str]:
    """sha256 of every file."""
    found = {}
    for name in dict.fromkeys(view.file for view in views):
        alive()
        try:
            with store.open(name) as file:
                found[name] = sha256(file)
        except (ValueError, OSError):
            continue  # reported as unreadable
    return found


def _count(report: Report, train: DataSet, val: DataSet, seen: list[_Seen]) -> None:
    mine = [entry for entry in seen if not entry.view.file.startswith("val/")]
    files = {entry.view.file: entry for entry in mine}
    report.counts = {
        "subjects": len(train.subjects),
        "variant views": sum(len(group.views) for group in train.subjects),
        "clips": len({entry.view.file for entry in mine if entry.view.frame is not None}),
        "loose pictures": sum(len(group.views) for group in train.loose),
        "masks": sum(entry.masked for entry in mine),
        "captions": sum(entry.view.caption is not None for entry in files.values()),
        "class captions": sum(
            entry.view.caption is None and entry.view.class_file is not None for entry in files.values()
        ),
        "empty captions": 0,
        "val subjects": len(val.subjects),
        "val loose pictures": sum(len(group.views) for group in val.loose),
    }
    if sides := [entry.side for entry in mine if entry.side]:
        report.counts["smallest side"] = min(sides)


def _files(seen: list[_Seen], broken: dict[str, str], size: int) -> list[Problem]:
    errors = broken | {entry.view.name: entry.error for entry in seen if entry.error}
    problems = [
        Problem("error", "unreadable", sentence.removeprefix("Training data: "), (name,))
        for name, sentence in errors.items()
    ]
    small = [entry for entry in seen if 0 < entry.side < size]
    if small:
        names = [entry.view.name for entry in small]
        problems.append(
            Problem(
                "warning",
                "small",
                f"{len(small)} pictures are smaller than {size} pixels and get enlarged, which teaches blur: {_some(names)}; "
                "replace them or train at a smaller size.",
                tuple(names),
            )
        )
    return problems


def _masks(seen: list[_Seen]) -> list[Problem]:
    names = [entry.view.mask or entry.view.name for entry in seen if entry.empty_mask]
    if not names:
        return []
    sentence = f"{len(names)} masks are black everywhere: {_some(names)}; paint the subject white or remove the mask."
    return [Problem("error", "empty mask", sentence, tuple(names))]


def _captions(data: DataSet, tokens: int, report: Report, alive: Callable[[], None]) -> list[Problem]:
    from ..encoders.text_tower import count_tokens  # loads open_clip's vocabulary

    empty, long, problems = [], [], []
    texts: dict[str, int] = {}
    for file, view in {view.file: view for _, view in data.views()}.items():
        alive()
        try:
            text = data.caption(view)
        except ValueError as error:
            problems.append(Problem("error", "caption", str(error).removeprefix("Training data: "), (file,)))
            continue
        if not text:
            empty.append(file)
            continue
        if text not in texts:
            texts[text] = count_tokens(text)
        if texts[text] > tokens:
            long.append(file)
    report.counts["empty captions"] = len(empty)
    if empty:
        problems.append(
            Problem(
                "warning",
                "empty caption",
                f"{len(empty)} pictures have no caption, so a prompt cannot ask for anything in them: {_some(empty)}; "
                "write a .txt of the same name beside each, or a class.txt per folder.",
                tuple(empty),
            )
        )
    if long:
        problems.append(
            Problem(
                "warning",
                "long caption",
                f"{len(long)} captions exceed {tokens} tokens and get cut off: {_some(long)}; shorten them.",
                tuple(long),
            )
        )
    return problems


def _duplicates(train: DataSet, seen: list[_Seen], digests: dict[str, str], alive: Callable[[], None]) -> list[Problem]:
    problems: list[Problem] = []
    by_digest: dict[str, list[str]] = defaultdict(list)
    for name, digest in digests.items():
        by_digest[digest].append(name)
    for names in by_digest.values():
        trained, held = ([n for n in names if n.startswith("val/") is held_out] for held_out in (False, True))
        if trained and held:
            sentence = f"{held[0]} is held out for validation and trained on as {trained[0]}; take one of them out."
            problems.append(Problem("error", "val overlap", sentence, tuple(names)))
        folders = Counter(name.rpartition("/")[0] for name in trained)
        if len(folders) > 1:
            sentence = (
                f"the same file lies in several folders: {_some(trained)}; keep one, or its subject counts as two."
            )
            problems.append(Problem("warning", "duplicate", sentence, tuple(trained)))
        elif len(trained) > 1 and not trained[0].startswith("variant/"):
            sentence = f"the same file is there {len(trained)} times: {_some(trained)}; keep one."
            problems.append(Problem("warning", "duplicate", sentence, tuple(trained)))
    subjects = {group.name for group in train.subjects}
    by_group: dict[str, list[_Seen]] = defaultdict(list)
    for entry in seen:
        if entry.look is not None and entry.group.name in subjects:
            by_group[entry.group.name].append(entry)
    for name, entries in by_group.items():
        problems += _alike(name, entries, alive)
    return problems


def _alike(name: str, entries: list[_Seen], alive: Callable[[], None]) -> list[Problem]:
    """Views of one subject that do not vary from each other. Pairs are counted, never listed."""
    same, near = _Pairs(entries), _Pairs(entries)
    vectors, least = _vectors(entries)
    numbers = {pixels: i for i, pixels in enumerate({entry.pixels: None for entry in entries})}
    pictures = np.array([numbers[entry.pixels] for entry in entries])
    for begin in range(0, len(entries), BLOCK):
        alive()
        rows = slice(begin, begin + BLOCK)
        later = np.arange(begin, len(entries)) > np.arange(len(entries))[rows, None]  # each pair once
        equal = pictures[rows, None] == pictures[begin:]
        same.count(equal & later, begin)
        near.count((vectors[rows] @ vectors[begin:].T >= least) & ~equal & later, begin)
    problems = []
    if same.number:
        sentence = (
            f"{name} shows the same picture twice ({same.first}, {same.number} such pairs), which teaches copying under the gate of "
            "variation; keep one of each."
        )
        problems.append(Problem("error", "same view", sentence, same.names()))
    if near.number:
        sentence = (
            f"{name} has {near.number} pairs of views that look alike ({near.first}), so they show no variation; use pictures that "
            "differ more, or a larger min_frame_gap for clips."
        )
        problems.append(Problem("warning", "near duplicate", sentence, near.names()))
    return problems


def _vectors(entries: list[_Seen]) -> tuple[np.ndarray, float]:
    """(n, width) of float32, and the product of two rows from which on two views look alike."""
    if all(entry.embedding is not None for entry in entries):
        return np.stack([entry.embedding.numpy() for entry in entries]), COSINE
    # bits as -1 and 1: every one that differs takes 2 from the product
    return np.stack([entry.look for entry in entries]).astype(np.float32) * 2 - 1, HASH * HASH - 2 * ALIKE


class _Pairs:
    """How many pairs of views there are, which views are in one, and the first pair as an example."""

    def __init__(self, entries: list[_Seen]):
        self.entries, self.number, self.first = entries, 0, ""
        self._in_one = np.zeros(len(entries), bool)

    def count(self, pairs: np.ndarray, begin: int) -> None:
        """(rows, columns) of bool, both from view `begin` on."""
        self.number += int(pairs.sum())
        self._in_one[begin : begin + len(pairs)] |= pairs.any(1)
        self._in_one[begin:] |= pairs.any(0)
        if not self.first and pairs.any():
            places = np.unravel_index(pairs.argmax(), pairs.shape)
            self.first = " and ".join(self.entries[begin + i].view.name.rpartition("/")[2] for i in places)

    def names(self) -> tuple[str, ...]:
        return tuple(self.entries[i].view.name for i in np.flatnonzero(self._in_one))


def _structure(train: DataSet, val: DataSet) -> list[Problem]:
    problems = []
    for data in (train, val):
        for group in data.subjects:
            if len(group.views) < 2:
                sentence = (
                    f"{group.name} has one view, a subject needs two or more; add pictures or move it to invariant."
                )
                problems.append(Problem("error", "one view", sentence, (group.name,)))
    repeated = [group for group in (*train.subjects, *train.loose) if group.repeats > 1]
    if repeated:
        most = max(repeated, key=lambda group: group.repeats)
        sentence = (
            f"{len(repeated)} folders count several times by their names ({most.name} {most.repeats} times); "
            "if those numbers mean something else, write repeats = false into dataset.toml."
        )
        problems.append(Problem("note", "repeats", sentence, tuple(group.name for group in repeated)))
    if train.subjects and not train.loose:
        sentence = "there are no loose pictures in invariant, so the subjects' pictures serve for invariant pairs, too."
        problems.append(Problem("note", "no invariant", sentence, ()))
    if not (train.subjects or train.loose):
        sentence = "there is no picture to train on; the sentences about files that are not used may say why."
        problems.append(Problem("error", "nothing", sentence, ()))
    elif not train.subjects:
        sentence = "there are no subjects in variant, so only mix = 0 can be trained, without which personalization learns nothing."
        problems.append(Problem("warning", "no variant", sentence, ()))
    if not any(True for _ in val.views()):
        sentence = "there is no val folder, so nothing is held out to look at; move some subjects and pictures there."
        problems.append(Problem("note", "no val", sentence, ()))
    unused = [name for name in (*train.unused, *val.unused) if not name.endswith(("import.json", "shards.json"))]
    unused = [name for name in unused if not name.lower().startswith(ABOUT)]
    for kind, names, sentence in _why_unused(unused):
        problems.append(Problem("warning", kind, f"{len(names)} {sentence.format(_some(names))}", tuple(names)))
        unused = [name for name in unused if name not in names]
    if unused:
        sentence = (
            f"{len(unused)} files are not used: {_some(unused)}; they lie in the wrong place or belong to no picture."
        )
        problems.append(Problem("warning", "unused", sentence, tuple(unused)))
    return problems


def _why_unused(names: list[str]) -> list[tuple[str, list[str], str]]:
    """(kind, files, sentence) for files of which one can tell why they are not used."""
    masked, unread, deep = [], [], []
    for name in names:
        stem, ending = os.path.splitext(name.lower())
        kind, _, inner = name.removeprefix("val/").partition("/")
        if ending in UNREAD:
            unread.append(name)
        elif ending in PICTURES and kind in KINDS and inner.count("/") > 1:
            deep.append(name)
        elif ending in PICTURES and stem.endswith(("mask", "masklabel")) and not stem.endswith(".mask"):
            masked.append(name)
    found = [
        (
            "unread format",
            unread,
            f"files are in formats that are not read ({', '.join(sorted({os.path.splitext(n.lower())[1] for n in unread}))}): "
            "{}; save them as PNG or JPEG.",
        ),
        (
            "too deep",
            deep,
            "pictures lie one folder too deep: {}; put each subject's folder directly into variant, loose pictures into invariant "
            "or one folder in it.",
        ),
        (
            "unsure mask",
            masked,
            "masks are left out, because in them white may mean the background: {}; rename them to NAME.mask.png where white is the "
            "subject.",
        ),
    ]
    return [one for one in found if one[1]]


def _some(names: list[str]) -> str:
    more = len(names) - EXAMPLES
    return ", ".join(names[:EXAMPLES]) + (f" and {more} more" if more > 0 else "")
