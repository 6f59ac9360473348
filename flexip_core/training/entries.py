"""The tensors of a cache by name, and what their names are made of.

A name says the picture's content, its mask's, the encoder file's and the cut: a changed picture, caption or encoder leaves all
other entries as they are. Shards are safetensors files, each written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from ..files.folders import is_system
from ..files.parse import read_json
from ..files.weights import read_header, sha256, write_atomically
from .choice import Choice, load
from .data import INVARIANT, VARIANT
from .dataset import DataSet, View
from .pictures import Cut, has_alpha

KEPT = torch.float16  # pictures are float32: that tells them from what was kept
ENTRIES = ("latents", "text", "cls", "patches")
SHARD_BYTES = 256 * 2**20
SHARD_ENTRIES = 50_000  # so that its header is one that weights.py reads
MEMO = "files.json"
_VERSION = "1"  # of how pictures are cut; another one makes all entries again


def file_identity(
    checkpoint: str | os.PathLike, clip_vision: str | os.PathLike, dino: str | os.PathLike, cache: str | os.PathLike
) -> dict[str, str]:
    """The files that made the entries. Hashes are remembered in the cache folder until a file changes."""
    memo = Memo(Path(cache))
    hashes = [memo.file(path) for path in (checkpoint, checkpoint, clip_vision, dino)]
    memo.save()
    return dict(zip(ENTRIES, hashes))


class Memo:
    """What is known of files as long as their stamp stays the same."""

    def __init__(self, folder: Path):
        self.path = folder / MEMO
        try:
            found = read_json(self.path)
        except (OSError, ValueError):
            found = {}
        self.known: dict[str, list] = found if isinstance(found, dict) else {}
        self.changed = False

    def get(self, name: str, stamp: list, make: Callable[[], Any]) -> Any:
        known = self.known.get(name)
        if not isinstance(known, list) or len(known) != 2 or known[0] != stamp:
            known = self.known[name] = [stamp, make()]
            self.changed = True
        return known[1]

    def file(self, path: str | os.PathLike) -> str:
        path = Path(path)
        try:
            about = path.stat()
            return self.get(str(path.resolve()), [about.st_size, about.st_mtime_ns], lambda: _hash(path))
        except OSError as error:
            raise ValueError(f"Cache: {path} cannot be read ({error.strerror}); check the name.") from None

    def save(self) -> None:
        if self.changed:
            write_atomically(self.path, json.dumps(self.known, ensure_ascii=False).encode())
            self.changed = False


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return sha256(file)


class Entries:
    """Tensors by name, in the shards of a folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._shard_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._new: dict[str, torch.Tensor] = {}
        self._pending = 0  # bytes of them
        self._lock = threading.Lock()
        for shard in self._shards():
            try:
                names = read_header(shard).shapes
            except ValueError:
                raise ValueError(
                    f"Cache: {shard.name} in {self.folder} is damaged; delete it and run `cache` again."
                ) from None
            self._shard_of |= dict.fromkeys(names, shard)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of or name in self._new

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._lock:
            if name in self._new:
                return self._new[name]
            shard = self._shard_of[name]
            if shard not in self._open:
                self._open[shard] = safe_open(str(shard), framework="pt", device="cpu")
            return self._open[shard].get_tensor(name)

    def add(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().to("cpu", KEPT).contiguous().clone()
        if not value.isfinite().all():
            raise RuntimeError(
                "Cache: an encoder gave values beyond half precision (or none at all); train without a cache, or "
                "look for damaged pictures with `check`."
            )
        replaced = self._new.get(name)
        self._new[name] = value
        self._pending += value.nbytes - (0 if replaced is None else replaced.nbytes)
        if self._pending >= SHARD_BYTES or len(self._new) >= SHARD_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """What was added is on the disk afterwards. A shard is named after what it holds, so that processes do not collide."""
        if self._new:
            name = hashlib.sha256("".join(sorted(self._new)).encode()).hexdigest()[:24]
            path = self.folder / f"{name}.safetensors"
            write_atomically(path, save(self._new))
            self._open.pop(path, None)
            self._shard_of |= dict.fromkeys(self._new, path)
            self._new, self._pending = {}, 0

    def bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self._shards())

    def _shards(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.safetensors") if not is_system(path.name))


@dataclass(frozen=True)
class Names:
    """The names of entries. Two things that differ in anything that matters have different names."""

    size: int
    identity: Mapping[str, str]

    def latents(self, content: str) -> str:
        return self._name("latents", content)

    def feature(self, entry: str, content: str, cut: Cut) -> str:
        return self._name(entry, content, repr(cut))

    def text(self, phrases: Iterable[str]) -> str:
        return _digest("text", self.identity["text"], ", ".join(p for p in phrases if p))

    def _name(self, entry: str, *parts: str) -> str:
        return _digest(entry, self.identity[entry], _VERSION, str(self.size), *parts)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


class Contents:
    """What views hold: a digest of picture, frame and mask, and whether there is a subject to cut out."""

    def __init__(self, data: DataSet, size: int, memo: Memo):
        self.data, self.size, self.memo = data, size, memo

    def __call__(self, view: View) -> tuple[str, bool]:
        store = self.data.store
        files = [view.file, *([view.mask] if view.mask else [])]
        stamp = [list(store.stamp(name)) for name in files]
        digest, masked = self.memo.get(f"{store.label}/{view.file}", stamp, lambda: self._make(view, files))
        return (digest if view.frame is None else f"{digest} {view.frame}/{view.frames}"), masked

    def _make(self, view: View, files: list[str]) -> tuple[str, bool]:
        digests = []
        for name in files:
            with self.data.store.open(name) as file:
                digests.append(sha256(file))
        if view.frame is not None:
            return " ".join(digests), False
        with self.data.store.open(view.file) as file:
            cut_out = view.mask is not None or has_alpha(file)
        return " ".join(digests), cut_out and load(self.data.store, view, self.size).mask is not None


def check_place(cache: str | os.PathLike, data: str | os.PathLike) -> None:
    """ValueError for a cache folder that is the data folder, holds it or lies in it: a cache fills its folder with files."""
    one, other = Path(cache).resolve(), Path(data).resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ValueError(
            f"Cache: {cache} is the folder of the pictures, or one lies inside the other; choose a separate folder."
        )


def check_identity(identity: Mapping[str, str]) -> None:
    if missing := [entry for entry in ENTRIES if not identity.get(entry)]:
        raise ValueError(
            f"Cache: identity lacks {missing[0]}; give the hash of the file that makes it (file_identity)."
        )


def kinds_of(choice: Choice) -> dict[View, set[int]]:
    """For which kinds of pairs each view serves as reference."""
    found: dict[View, set[int]] = {}
    for kind, groups in ((VARIANT, choice.subjects), (INVARIANT, choice.loose)):
        for group in groups:
            for view in group.views:
                found.setdefault(view, set()).add(kind)
    return found


_DIGIT = 1024  # half precision holds whole numbers up to 2048


def place_name(latents: str) -> str:
    """The entry beside an entry of latents: pictures.target_place."""
    return f"{latents}.place"


def packed_place(place: torch.Tensor) -> torch.Tensor:
    """(4,) whole numbers -> (2, 4) that half precision holds exactly."""
    return torch.stack([place // _DIGIT, place % _DIGIT])


def unpacked_place(packed: torch.Tensor) -> torch.Tensor:
    high, low = packed.long()
    return _DIGIT * high + low
