"""Large data as WebDataset shards: tar files that stream well, hold whole subjects, and unpack to the same plain folders.

A sample is one subject, or as many of its views as `VIEWS`; a loose picture is one of its own. Its files lie side by side:
`0000012-mug.000.jpg 0000012-mug.000.txt 0000012-mug.000.mask.png 0000012-mug.001.jpg ... 0000012-mug.json`; what follows the first
dot is the field of the `webdataset` library. The JSON says what it is and what each file is called in the plain layout.

Training does not stream. Shards are read through an index of names, places and lengths (beside each shard, or made anew from its
headers), so that a batch is the same function of (seed, step, rank) as from folders, and a resumed run goes on bit by bit. The
index takes about half a kilobyte of memory per file. Whoever streams the shards with `webdataset` instead (ResampledShards,
RandomMix of variant-*.tar and invariant-*.tar) cannot go back to a position: seed by (seed, step, rank) there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..files.weights import write_atomically
from .dataset import CLASS, PARTS, SETTINGS, DataSet, FolderStore, Group, View, safe_name, scan
from .pictures import CLIPS, PICTURES

SHARD_BYTES = 2**30
VIEWS = 8  # of a subject in one sample, at most
MANIFEST = "shards.json"
FORMAT = 1
_OURS = re.compile(r"((val-)?(variant|invariant)-\d{6}\.(tar|index\.json)|shards\.json|dataset\.toml)(\.\d+\.tmp)?")
_BLOCK = tarfile.BLOCKSIZE


@dataclass
class _Sample:
    key: str
    about: dict
    files: list[tuple[str, str]] = field(default_factory=list)  # field, name in the plain layout

    def members(self) -> list[tuple[str, str | None]]:
        """Names in the tar and what they hold (None: the JSON), in order."""
        return [(f"{self.key}.{name}", plain) for name, plain in sorted(self.files)] + [(f"{self.key}.json", None)]

    def json(self) -> bytes:
        about = self.about | {"files": {name: plain for name, plain in sorted(self.files)}}
        return json.dumps(about, sort_keys=True, ensure_ascii=False).encode()


def pack(folder: str | os.PathLike, target: str | os.PathLike, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """The shards of a plain folder, in `target`. The same folder gives the same bytes; a shard may exceed the size by one sample.

    An interrupted run is begun again by the same call. ValueError for a target that holds anything else.
    """
    if shard_bytes < 1:
        raise ValueError(f"Packing: shards must have at least 1 byte, got {shard_bytes}.")
    store, target = FolderStore(folder), Path(target)
    parts = [scan(store, part) for part in PARTS]
    _check_target(target, Path(folder))
    write_atomically(target / MANIFEST, _json({"format": FORMAT, "finished": False}))
    for leftover in target.iterdir():  # of an interrupted run
        if leftover.name != MANIFEST:
            leftover.unlink()
    if SETTINGS in store.names():
        write_atomically(target / SETTINGS, _read(store, SETTINGS))
    shards = []
    for data in parts:
        for kind, groups in (("variant", data.subjects), ("invariant", data.loose)):
            name = f"val-{kind}" if data.part == "val" else kind
            for number, samples in enumerate(_by_size(store, _samples(kind, data, groups), shard_bytes)):
                shards.append(_write_shard(store, target / f"{name}-{number:06d}.tar", samples))
    sizes = {shard.name: shard.stat().st_size for shard in shards}
    write_atomically(target / MANIFEST, _json({"format": FORMAT, "finished": True, "shards": sizes}))
    return shards


def _check_target(target: Path, folder: Path) -> None:
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"Packing: {target} lies inside the data that it is made of; choose a folder elsewhere.")
    if target.is_file():
        raise ValueError(f"Packing: {target} is a file; choose a folder.")
    present = sorted(path.name for path in target.iterdir()) if target.exists() else []
    if strangers := [name for name in present if not _OURS.fullmatch(name)]:
        raise ValueError(f"Packing: {target} already holds {strangers[0]}; choose an empty or new folder.")
    if present and (MANIFEST not in present or _manifest(target)["finished"]):
        raise ValueError(f"Packing: {target} already holds packed data; choose an empty or new folder.")


def _samples(kind: str, data: DataSet, groups: Iterable[Group]) -> Iterator[_Sample]:
    number = 0
    for group in groups:
        files = list(dict.fromkeys(view.file for view in group.views))
        by_file: dict[str, View] = {view.file: view for view in group.views}
        step = VIEWS if kind == "variant" else 1
        for begin in range(0, len(files), step):
            chosen = [by_file[name] for name in files[begin : begin + step]]
            title = group.name if kind == "variant" else os.path.splitext(chosen[0].file)[0]
            slug = re.sub(r"[^A-Za-z0-9_-]+", "_", title.rpartition("/")[2])[:40]
            about = {"kind": kind, "folder": group.name, "captions": [data.caption(view) for view in chosen]}
            sample = _Sample(f"{number:07d}-{slug}", about)
            for i, view in enumerate(chosen):
                prefix = f"{i:03d}." if kind == "variant" else ""
                extension = os.path.splitext(view.file)[1].lower().lstrip(".")
                sample.files.append((prefix + extension, view.file))
                sample.files += [(prefix + "mask.png", view.mask)] if view.mask else []
                sample.files += [(prefix + "txt", view.caption)] if view.caption else []
            if chosen[0].class_file:
                sample.files.append((CLASS, chosen[0].class_file))
            for _, plain in sample.files:
                if not safe_name(plain):
                    raise ValueError(f"Packing: {plain} has a backslash or a colon in its name; rename it.")
            yield sample
            number += 1


def _by_size(store: FolderStore, samples: Iterable[_Sample], most: int) -> Iterator[list[_Sample]]:
    """The samples of one shard after another."""
    shard: list[_Sample] = []
    total = 0
    for sample in samples:
        size = sum(store.stamp(plain)[0] + _BLOCK for _, plain in sample.files)
        if shard and total + size > most:
            yield shard
            shard, total = [], 0
        shard.append(sample)
        total += size
    if shard:
        yield shard


def _write_shard(store: FolderStore, path: Path, samples: list[_Sample]) -> Path:
    """Same content, same bytes: no times, owners or rights."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    places: dict[str, list] = {}
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in samples:
                    for name, plain in sample.members():
                        content = sample.json() if plain is None else _read(store, plain)
                        info = tarfile.TarInfo(name)
                        info.size, info.mtime, info.mode = len(content), 0, 0o644
                        begin = tar.offset + _BLOCK
                        tar.addfile(info, io.BytesIO(content))
                        if plain is not None:
                            places[plain] = [begin, len(content), hashlib.sha256(content).hexdigest()]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    index = {"format": FORMAT, "bytes": path.stat().st_size, "files": places}
    write_atomically(_index_path(path), _json(index))
    return path


def unpack(shards: str | os.PathLike, folder: str | os.PathLike) -> int:
    """The plain folder again, byte by byte; returns the number of files. The folder must be new or empty, or a part of the same.

    Files that are there with the right size are kept, so an interrupted run goes on.
    """
    store, folder = ShardStore(shards), Path(folder)
    names = store.names()
    if folder.exists():
        wanted = set(names)
        strangers = [name for name in FolderStore(folder).names() if name not in wanted and not name.endswith(".tmp")]
        if strangers:
            raise ValueError(f"Unpacking: {folder} already holds {strangers[0]}; choose an empty or new folder.")
    for name in names:
        path = folder / name
        if not path.exists() or path.stat().st_size != store.length(name):
            write_atomically(path, _read(store, name))
    return len(names)


class ShardStore:
    """The files inside the shards of a folder, under their names in the plain layout.

    Shards of other makers are read, too: `key.jpg` (with `key.txt`, `key.mask.png`) is a loose picture, `key.000.jpg key.001.jpg`
    are views of a subject.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.label = str(folder)
        shards = sorted(self.folder.glob("*.tar"))
        if not shards:
            raise ValueError(f"Shards: {folder} holds no .tar files; give a folder that `pack` has filled.")
        if (self.folder / MANIFEST).exists():
            about = _manifest(self.folder)
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
                if not safe_name(name) or name == SETTINGS:
                    raise ValueError(
                        f"Shards: {shard.name} holds a file called {name!r}, which would leave the folder; do not use it."
                    )
                known = self._places.setdefault(name, (shard, begin, length, digest))
                if known[2] != length or (digest and known[3] and digest != known[3]):
                    raise ValueError(
                        f"Shards: {shard.name} and {known[0].name} hold different files called {name}; "
                        "unpack them into folders of their own."
                    )
        self._names = sorted([*self._places, *([SETTINGS] if (self.folder / SETTINGS).exists() else [])])

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
    """Plain name -> where it begins, its length, its sha256 ("" if nobody counted it)."""
    try:
        index = json.loads(_index_path(shard).read_bytes())
        if index["format"] == FORMAT and index["bytes"] == shard.stat().st_size:
            return {
                name: (int(begin), int(length), str(digest)) for name, (begin, length, digest) in index["files"].items()
            }
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it is another shard's: everything is in the tar itself
    return _index_from_headers(shard)


def _index_from_headers(shard: Path) -> dict[str, tuple[int, int, str]]:
    found: dict[str, tuple[int, int, str]] = {}
    sample: dict[str, tuple[int, int, str]] = {}
    key = None
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
                sample[name.lower()] = (member.offset_data, member.size, "")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"Shards: {shard.name} is damaged or no tar file ({error}); copy it again.") from None
    return found | _plain(shard, key, sample)


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
            names = json.loads(raw).get("files")
        except (ValueError, AttributeError):
            raise ValueError(f"Shards: {key}.json in {shard.name} is not JSON; pack again.") from None
    if isinstance(names, dict):
        if missing := sorted(set(names) - set(sample)):
            raise ValueError(f"Shards: {key}.{missing[0]} is missing in {shard.name}; pack again.")
    else:
        names = _guessed(key.replace("/", "_"), sample)
    return {str(name): sample[part] for part, name in names.items()}


def _guessed(key: str, sample: Iterable[str]) -> dict[str, str]:
    names = {}
    for part in sample:
        stem, dot, _ = part.rpartition(".")
        first = part.split(".")[0]
        if part.endswith(("mask.png", "txt", *(extension[1:] for extension in (*PICTURES, *CLIPS)))):
            if first.isdigit() and dot:
                names[part] = f"variant/{key}/{part}"
            elif part == CLASS:
                names[part] = f"variant/{key}/{CLASS}"
            elif not stem or part == "mask.png":
                names[part] = f"invariant/{key}.{part}"
    return names


def _manifest(folder: Path) -> dict:
    try:
        about = json.loads((folder / MANIFEST).read_bytes())
        if about["format"] == FORMAT and (not about["finished"] or isinstance(about["shards"], dict)):
            return about
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"Shards: {MANIFEST} in {folder} is damaged or of another version; pack again into a new folder.")


def _index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.json")


def _json(data: dict) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()


def _read(store, name: str) -> bytes:
    with store.open(name) as file:
        return file.read()
