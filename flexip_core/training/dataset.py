"""Training data as plain folders that anybody can make by hand: what belongs where (the pairs are made in folders.py).

    dataset/
      variant/dog/  1.jpg 1.txt 1.mask.png 2.png clip.mp4 class.txt    a folder per subject, two or more pictures of it (or clips)
      invariant/    sea.jpg sea.txt                                    loose pictures; their references are made from themselves
      val/          variant/, invariant/ once more                     never trained on
      dataset.toml                                                     optional, see DataConfig

A caption lies beside its picture (same name, .txt or .caption); without one, class.txt ("dog") gives "a photo of a dog". A mask
(white = subject) is as large as its picture; OneTrainer's `1-masklabel.png` is one, too. Endings may be in any letter case. A folder called 10_dog counts ten times, as in kohya's scripts.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ..files.folders import masks
from ..files.parse import parse_toml
from .data import KINDS
from .pictures import CLIPS, PICTURES, clip_length
from .shard_store import ShardStore, shards_in
from .stores import CAPTIONS, CLASS, SETTINGS, FolderStore, Store

PARTS = ("train", "val")
LONGEST_TEXT = 2**20  # bytes of a caption, a class or dataset.toml
MOST_VIEWS = 4096  # of one clip, whatever dataset.toml wishes
_REPEATS = re.compile(r"([1-9]\d{0,3})_.+")


@dataclass(frozen=True, slots=True)
class View:
    """One picture, or one frame of a clip."""

    file: str
    frame: int | None = None
    frames: int = 0  # of the clip
    mask: str | None = None
    caption: str | None = None  # the file with the text
    class_file: str | None = None

    @property
    def name(self) -> str:
        return self.file if self.frame is None else f"{self.file} frame {self.frame}"


@dataclass(frozen=True)
class Group:
    """A subject with its views, or a folder of loose pictures."""

    name: str  # its folder, such as "variant/dog"
    views: tuple[View, ...]
    weight: float
    repeats: int = 1  # from the folder's name; part of the weight


@dataclass(frozen=True)
class DataConfig:
    """dataset.toml. A weight multiplies how often a folder's pictures are drawn; 0 leaves them out."""

    weights: Mapping[str, float]  # [weights] "variant/dog" = 2.0
    min_frame_gap: int = 12  # frames between two views of one clip, at least
    clip_frames: int = 16  # views of one clip, at most
    repeats: bool = True  # a folder 10_dog counts ten times; false where the numbers mean something else


@dataclass(frozen=True)
class DataSet:
    """One part ("train" or "val") of a data set, as it is on disk; nothing is decoded yet except the length of clips."""

    store: Store
    part: str
    cfg: DataConfig
    subjects: tuple[Group, ...]
    loose: tuple[Group, ...]
    unused: tuple[str, ...]  # files that are not part of the data

    def caption(self, view: View) -> str:
        """White space and line ends become single spaces. "" if there is none."""
        if view.caption is not None:
            return self._text(view.caption)
        name = self._text(view.class_file) if view.class_file is not None else ""
        return f"a photo of {'an' if name[:1].lower() in 'aeiou' else 'a'} {name}" if name else ""

    def _text(self, name: str) -> str:
        data = _head(self.store, name)
        try:
            return " ".join(data.decode("utf-8-sig").split())
        except UnicodeDecodeError:
            raise ValueError(f"Training data: {name} is not text in UTF-8; save it as such.") from None

    def views(self) -> Iterator[tuple[Group, View]]:
        for group in (*self.subjects, *self.loose):
            for view in group.views:
                yield group, view


def _head(store: Store, name: str) -> bytes:
    """All of a text. ValueError for one that is longer than anybody would write there."""
    with store.open(name) as file:
        data = file.read(LONGEST_TEXT + 1)
    if len(data) > LONGEST_TEXT:
        raise ValueError(f"Training data: {name} is longer than {LONGEST_TEXT} bytes; shorten it.")
    return data


def open_store(data: str | os.PathLike) -> Store:
    """A plain folder, or a folder of shards."""
    if shards_in(Path(data)):
        return ShardStore(data)
    return FolderStore(data)


def scan(
    data: str | os.PathLike | Store,
    part: str = "train",
    broken: dict[str, str] | None = None,
    alive: Callable[[], None] = lambda: None,
) -> DataSet:
    """ValueError, one sentence, for what is not a data set and for clips that cannot be read; the latter go to `broken` if given.

    `alive` is called before each clip is opened; what it raises ends the scan.
    """
    if part not in PARTS:
        raise ValueError(f"Training data: the part {part!r} is unknown; choose train or val.")
    store = open_store(data) if isinstance(data, (str, os.PathLike)) else data
    names = store.names()
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, base = name.rpartition("/")
        folders.setdefault(folder, []).append(base)
    cfg = read_settings(store, folders)
    prefix = "val/" if part == "val" else ""
    if part == "train" and not any(name.startswith(tuple(f"{kind}/" for kind in KINDS)) for name in names):
        raise ValueError(
            f"Training data: {store.label} holds no pictures in a folder variant or invariant; put each subject's pictures into a "
            "folder of their own inside variant, and loose pictures into invariant."
        )
    subjects, loose, unused = [], [], []
    for folder, bases in sorted(folders.items()):
        if f"{folder}/".startswith("val/") != (part == "val"):
            continue
        kind, _, inner = folder.removeprefix(prefix).partition("/")
        if kind not in KINDS or "/" in inner or (kind == "variant" and not inner):
            unused += [f"{folder}/{base}".lstrip("/") for base in bases if base != SETTINGS]
            continue
        views, rest = _views(store, folder, bases, cfg, broken, alive)
        unused += rest
        if views:
            (subjects if kind == "variant" else loose).append(_group(folder, inner, views, cfg))
    return DataSet(store, part, cfg, tuple(subjects), tuple(loose), tuple(unused))


def part_of(data: str | os.PathLike | Store | DataSet, part: str = "train") -> DataSet:
    """As `scan`; what is already scanned is taken as it is."""
    return data if isinstance(data, DataSet) else scan(data, part)


def _group(folder: str, inner: str, views: list[View], cfg: DataConfig) -> Group:
    match = _REPEATS.fullmatch(inner) if cfg.repeats else None
    repeats = int(match[1]) if match else 1
    return Group(folder, tuple(views), cfg.weights.get(folder, 1.0) * repeats, repeats)


def _views(
    store: Store,
    folder: str,
    bases: list[str],
    cfg: DataConfig,
    broken: dict[str, str] | None,
    alive: Callable[[], None],
) -> tuple[list[View], list[str]]:
    """The views of a folder, and its files that are no part of the data."""
    found, used, views = masks(bases, PICTURES, CLIPS), set(), []
    texts = {(stem, ending.lower()): base for base in bases for stem, ending in (os.path.splitext(base),)}

    def take(base: str | None) -> str | None:
        if base is None:
            return None
        used.add(base)
        return f"{folder}/{base}"

    class_file = take(next((base for base in bases if base.lower() == CLASS), None))
    for base in bases:
        stem, extension = os.path.splitext(base)
        extension = extension.lower()
        if base in found or extension not in (*PICTURES, *CLIPS):
            continue
        used.add(base)
        path = f"{folder}/{base}"
        caption = take(next((texts[stem, ending] for ending in CAPTIONS if (stem, ending) in texts), None))
        if extension in PICTURES:
            views.append(View(path, mask=take(found.of.get(base)), caption=caption, class_file=class_file))
        else:
            alive()
            try:
                with store.open(path) as file:
                    frames = clip_length(file, path)
            except ValueError as error:
                if broken is None:
                    raise
                broken[path] = str(error)
                continue
            chosen = clip_frames(frames, cfg.min_frame_gap, cfg.clip_frames)
            views += [View(path, k, frames, caption=caption, class_file=class_file) for k in chosen]
    return views, [f"{folder}/{base}" for base in bases if base not in used]


def clip_frames(frames: int, gap: int, most: int) -> list[int]:
    """Which frames are views: evenly over the clip, any two at least `gap` apart, at most `most`."""
    count = min(most, 1 + (frames - 1) // gap)
    return [0] if count == 1 else [round(i * (frames - 1) / (count - 1)) for i in range(count)] if count else []


def read_settings(store: Store, folders: Iterable[str]) -> DataConfig:
    """dataset.toml, strictly; without one, the defaults."""
    if SETTINGS not in store.names():
        return DataConfig({})
    try:
        text = _head(store, SETTINGS).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{SETTINGS} is not a TOML file: {error}.") from None
    data = parse_toml(text, SETTINGS)
    known = [f.name for f in fields(DataConfig)]
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{SETTINGS}: unknown setting {unknown[0]}; it has {', '.join(known)}.")
    for name in ("min_frame_gap", "clip_frames"):
        if name in data and (type(data[name]) is not int or data[name] < 1):
            raise ValueError(f"{SETTINGS}: {name} must be a whole number of at least 1, got {data[name]!r}.")
    if data.get("clip_frames", 1) > MOST_VIEWS:
        raise ValueError(f"{SETTINGS}: clip_frames must be at most {MOST_VIEWS}, got {data['clip_frames']!r}.")
    if type(data.get("repeats", True)) is not bool:
        raise ValueError(f"{SETTINGS}: repeats must be true or false, got {data['repeats']!r}.")
    weights = data.get("weights", {})
    if not isinstance(weights, dict):
        raise ValueError(f'{SETTINGS}: weights must be a table such as [weights] "variant/dog" = 2.0, got {weights!r}.')
    folders = set(folders)
    for name, value in weights.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{SETTINGS}: the weight of {name} must be a number of at least 0, got {value!r}.")
        if name not in folders:
            raise ValueError(
                f"{SETTINGS}: weights names {name!r}, which is not a folder with pictures; correct the name."
            )
    return DataConfig(**{**data, "weights": {name: float(value) for name, value in weights.items()}})


def phrases_of(caption: str) -> tuple[str, ...]:
    """ "a dog, in snow" -> ("a dog", "in snow")"""
    return tuple(phrase for part in caption.split(",") if (phrase := part.strip()))
