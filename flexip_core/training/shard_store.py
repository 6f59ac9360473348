"""The files of training data inside shards (shards.py makes them and says how they look)."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..files.folders import is_system
from ..files.parse import parse_json, read_json
from .pictures import CLIPS, PICTURES
from .stores import CLASS, SETTINGS, UNSAFE, safe_name

MANIFEST = "shards.json"
FORMAT = 1


class Refused(ValueError):
    """A whole sentence already."""


def shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if path.is_file() and not is_system(path.name))


class ShardStore:
    """The files inside the shards of a folder, under their names in the plain layout.

    Shards of other makers are read, too: `key.jpg` (with `key.txt`, `key.mask.png`) is a loose picture, `key.000.jpg key.001.jpg`
    are views of a subject.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.label = str(folder)
        shards = shards_in(self.folder)
        if not shards:
            raise ValueError(f"Shards: {folder} holds no .tar files; give a folder that `pack` has filled.")
        if (self.folder / MANIFEST).exists():
            about = manifest(self.folder)
            if not about["finished"]:
                raise ValueError(f"Shards: packing into {folder} was interrupted; pack again.")
            present = {path.name: path.stat().st_size for path in shards}
            for name, size in about["shards"].items():
                if present.get(name) != size:
                    state = "is missing" if name not in present else f"has {present[name]} bytes instead of {size}"
                    raise ValueError(f"Shards: {name} in {folder} {state}; copy it again.")
        self._places: dict[str, tuple[Path, int, int, str]] = {}
        for shard in shards:
            for name, (begin, length, digest) in _index(shard).items():
                if name == SETTINGS or not safe_name(name):
                    raise ValueError(f"Shards: {shard.name} holds a file called {name!r}, {UNSAFE}; do not use it.")
                known = self._places.setdefault(name, (shard, begin, length, digest))
                if known[2] != length or (digest and known[3] and digest != known[3]):
                    raise ValueError(
                        f"Shards: {shard.name} and {known[0].name} hold different files called {name}; "
                        "unpack them into folders of their own."
                    )
        folders = {str(parent) for name in self._places for parent in PurePosixPath(name).parents}
        if both := sorted(folders & self._places.keys()):
            raise ValueError(f"Shards: {both[0]} is a file and a folder in the shards of {folder}; do not use them.")
        settings = self.folder / SETTINGS
        if settings.is_symlink():
            raise ValueError(f"Shards: {SETTINGS} in {folder} is a link; put the file itself there (a copy).")
        self._names = sorted([*self._places, *([SETTINGS] if settings.exists() else [])])

    def names(self) -> list[str]:
        return self._names

    def length(self, name: str) -> int:
        return (self.folder / SETTINGS).stat().st_size if name == SETTINGS else self._places[name][2]

    def open(self, name: str) -> BinaryIO:
        if name == SETTINGS:
            return (self.folder / SETTINGS).open("rb")
        shard, begin, length, _ = self._places[name]
        try:
            with shard.open("rb") as file:
                file.seek(begin)
                content = file.read(length)
        except OSError as error:
            raise ValueError(f"Shards: {shard.name} cannot be read ({error.strerror}); copy it again.") from None
        if len(content) != length:
            raise ValueError(f"Shards: {shard.name} is cut off within {name}; copy it again.")
        return io.BytesIO(content)

    def stamp(self, name: str) -> tuple[str | int, ...]:
        shard, begin, length, digest = self._places[name]
        return (digest,) if digest else (shard.name, shard.stat().st_mtime_ns, begin, length)


def _index(shard: Path) -> dict[str, tuple[int, int, str]]:
    """Plain name -> where it begins, its length, its sha256 ("" if not known)."""
    try:
        index, size = read_json(index_path(shard)), shard.stat().st_size
        if index["format"] == FORMAT and index["bytes"] == size:
            return {name: _inside(size, *place) for name, place in index["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # there is none, or it is another shard's, or damaged: everything is in the tar itself
    return _index_from_headers(shard)


def _inside(size: int, begin: int, length: int, digest: str) -> tuple[int, int, str]:
    """ValueError for a place that a shard of `size` bytes does not have."""
    if (type(begin), type(length), type(digest)) != (int, int, str) or not 0 <= begin <= begin + length <= size:
        raise ValueError("it names bytes that are not there")
    return begin, length, digest


def _index_from_headers(shard: Path) -> dict[str, tuple[int, int, str]]:
    found: dict[str, tuple[int, int, str]] = {}
    sample: dict[str, tuple[int, int, str]] = {}
    key, size = None, shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile() or "." not in member.name.rpartition("/")[2]:
                    continue
                folder, slash, base = member.name.rpartition("/")
                stem, _, name = base.partition(".")
                if folder + slash + stem != key:
                    found |= _plain(shard, key, sample)
                    key, sample = folder + slash + stem, {}
                sample[name.lower()] = _inside(size, member.offset_data, member.size, "")
        return found | _plain(shard, key, sample)
    except Refused:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"Shards: {shard.name} is damaged or not a tar file ({str(error)[:160]}); copy it again."
        ) from None


def _plain(shard: Path, key: str | None, sample: dict[str, tuple[int, int, str]]) -> dict[str, tuple[int, int, str]]:
    """The files of one sample under their names in the plain layout: as its JSON says, or by the pattern of their fields."""
    if key is None or not sample:
        return {}
    names = None
    if "json" in sample:
        begin, length, _ = sample["json"]
        with shard.open("rb") as file:
            file.seek(begin)
            raw = file.read(length)
        try:
            names = parse_json(raw).get("files")
        except (ValueError, AttributeError):
            raise Refused(f"Shards: {key}.json in {shard.name} is not JSON; pack again.") from None
    if isinstance(names, dict):
        if missing := sorted(set(names) - set(sample)):
            raise Refused(f"Shards: {key}.{missing[0]} is missing in {shard.name}; pack again.")
    else:
        names = _guessed(key.replace("/", "_"), sample)
    return {str(name): sample[part] for part, name in names.items()}


def _guessed(key: str, sample: Iterable[str]) -> dict[str, str]:
    names = {}
    for part in sample:
        stem, dot, _ = part.rpartition(".")
        first = part.split(".")[0]
        if part.lower().endswith(("mask.png", "txt", "caption", *(extension[1:] for extension in (*PICTURES, *CLIPS)))):
            if first.isdigit() and dot:
                names[part] = f"variant/{key}/{part}"
            elif part == CLASS:
                names[part] = f"variant/{key}/{CLASS}"
            elif not stem or part == "mask.png":
                names[part] = f"invariant/{key}.{part}"
    return names


def manifest(folder: Path) -> dict:
    try:
        about = read_json(folder / MANIFEST)
        if about["format"] == FORMAT and (not about["finished"] or isinstance(about["shards"], dict)):
            return about
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"Shards: {MANIFEST} in {folder} is damaged or of another version; pack again into a new folder.")


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.json")
