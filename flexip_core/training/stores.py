"""Where the files of training data are (a plain folder, or the shards of shard_store.py), and the names that mean something there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from ..files.folders import is_system
from ..files.names import is_device

LONGEST_NAME = 1000
SETTINGS = "dataset.toml"
CLASS = "class.txt"
CAPTIONS = (".txt", ".caption")  # kohya's scripts write the second; the first wins
MASK = ".mask.png"

UNSAFE = "which leaves the folder, has a backslash or a colon, or is kept by Windows for a device"


class Store(Protocol):
    """Where the files of a data set are: a folder or shards. Names are relative, with slashes."""

    label: str  # what messages call it

    def names(self) -> list[str]:
        """All files, sorted."""

    def open(self, name: str) -> BinaryIO: ...

    def stamp(self, name: str) -> tuple[str | int, ...]:
        """Changes when the file changes; cheap."""


FOLLOW_LINKS: ContextVar[bool] = ContextVar("follow_links", default=False)  # set by the commands' --follow-links


class FolderStore:
    """The files under a folder. Links are refused unless FOLLOW_LINKS: what they point at may change or lie anywhere."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.label = str(folder)
        if not self.folder.is_dir():
            what = "is a file, not a folder" if self.folder.exists() else "does not exist"
            raise ValueError(f"Training data: {folder} {what}; give the folder that holds variant/ or invariant/.")
        self._names = sorted(self._walk(self.folder, "", (self.folder.resolve(),)))

    def _walk(self, folder: Path, prefix: str, within: tuple[Path, ...]) -> Iterator[str]:
        """`within`: the real folders from the top to this one."""
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if is_system(entry.name):
                    continue
                if not name.isprintable():
                    raise ValueError(f"Training data: {name!r} in {self.label} is not a readable file name; rename it.")
                inside = within
                if entry.is_symlink() or _is_junction(entry):
                    inside = (*within, self._behind(name, Path(entry.path), (*within, folder.resolve())))
                if entry.is_dir():
                    yield from self._walk(folder / entry.name, name + "/", inside)
                elif entry.is_file():
                    yield name
                else:  # reading a pipe would wait for ever
                    raise ValueError(f"Training data: {name} in {self.label} is no file; delete it.")

    def _behind(self, name: str, link: Path, within: tuple[Path, ...]) -> Path:
        """What a link points at; ValueError unless it may be followed."""
        if not link.exists():
            raise ValueError(
                f"Training data: {name} in {self.label} is a link that leads nowhere; bring back what it points at, or delete it."
            )
        if not FOLLOW_LINKS.get():
            raise ValueError(
                f"Training data: {name} in {self.label} is a link; put the file or folder itself there (a copy), or start the "
                "command with --follow-links."
            )
        target = link.resolve()
        if any(folder == target or folder.is_relative_to(target) for folder in within):
            raise ValueError(
                f"Training data: {name} in {self.label} is a link that leads back to where it lies; delete it."
            )
        return target

    def names(self) -> list[str]:
        return self._names

    def open(self, name: str) -> BinaryIO:
        try:
            return (self.folder / name).open("rb")
        except OSError as error:
            raise ValueError(
                f"Training data: {name} in {self.label} cannot be opened ({error.strerror}); put it back."
            ) from None

    def stamp(self, name: str) -> tuple[int, int]:
        try:
            about = (self.folder / name).stat()
        except OSError as error:
            raise ValueError(
                f"Training data: {name} in {self.label} cannot be found ({error.strerror}); put it back."
            ) from None
        return about.st_size, about.st_mtime_ns


def _is_junction(entry: os.DirEntry) -> bool:
    return hasattr(entry, "is_junction") and entry.is_junction()  # Windows, Python 3.12


def read(store: Store, name: str) -> bytes:
    with store.open(name) as file:
        return file.read()


def safe_name(name: str) -> bool:
    """Whether a relative name stays inside its folder and can be a file's, on every system."""
    path = PurePosixPath(name)
    return (
        0 < len(name) <= LONGEST_NAME
        and not path.is_absolute()
        and not {"..", "."} & set(name.split("/"))
        and not set(name) & set("\\:\0")
        and not is_device(name)
    )
