"""Large data as WebDataset shards: tar files that stream well, hold whole subjects, and unpack to the same plain folders.

A sample is one subject, or as many of its views as `VIEWS`; a loose picture is one of its own. Its files lie side by side:
`0000012-mug.000.jpg 0000012-mug.000.txt 0000012-mug.000.mask.png 0000012-mug.001.jpg ... 0000012-mug.json`; what follows the first
dot is the field of the `webdataset` library. The JSON says what it is and what each file is called in the plain layout.

Training does not stream. Shards are read through an index of names, places and lengths (beside each shard, or made again from its
headers), so that a batch is the same function of (seed, step, rank) as from folders, and a resumed run continues bit for bit. The
index takes about half a kilobyte of memory per file. Whoever streams the shards with `webdataset` instead (ResampledShards,
RandomMix of variant-*.tar and invariant-*.tar) cannot go back to a position; they should seed by (seed, step, rank).
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

from ..files.weights import write_atomically
from .dataset import PARTS, DataSet, Group, View, scan
from .shard_store import FORMAT, MANIFEST, ShardStore, index_path, manifest
from .stores import CLASS, SETTINGS, UNSAFE, FolderStore, read, safe_name

SHARD_BYTES = 2**30
VIEWS = 8  # of a subject in one sample, at most
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

    The same call starts an interrupted run again. ValueError for a target that holds anything else.
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
        write_atomically(target / SETTINGS, read(store, SETTINGS))
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
    if present and (MANIFEST not in present or manifest(target)["finished"]):
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
                    raise ValueError(f"Packing: there is a file {plain}, {UNSAFE}; rename it.")
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
                        content = sample.json() if plain is None else read(store, plain)
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
    write_atomically(index_path(path), _json(index))
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
            write_atomically(path, read(store, name))
    return len(names)


def _json(data: dict) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()
