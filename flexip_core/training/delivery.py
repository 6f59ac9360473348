"""Nothing trained is overwritten: which adapters are a run's own, and how they leave its folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..files.parse import read_json
from ..files.weights import write_atomically
from .checkpointing import states
from .loop import BEST, FINAL

DELIVERED = "delivered.json"  # in the run's folder: the SHA-256 of every adapters file that it wrote elsewhere


def has_trained(folder: Path) -> bool:
    """Whether the run has left anything that another run would write over. A run's folder has one set of settings from then on."""
    return bool(states(folder)) or any((folder / name).exists() for name in (BEST, FINAL, DELIVERED))


def refuse_foreign(folder: Path, target: Path) -> None:
    """ValueError if a file `target` is there and the run of `folder` has not written it."""
    if not target.exists():
        return
    mine = {*_delivered(folder), *(_digest(folder / name) for name in (BEST, FINAL) if (folder / name).is_file())}
    if _digest(target) not in mine:
        raise ValueError(
            f"{target.name} in {target.parent} is not of this run, so it is not written over; give the run another name, or move "
            "the file away."
        )


def deliver(folder: Path, adapters: bytes, target: Path) -> None:
    """Writes adapters of the run of `folder` to `target`. ValueError as `refuse_foreign`: the file may have come meanwhile."""
    refuse_foreign(folder, target)
    known = [*_delivered(folder), hashlib.sha256(adapters).hexdigest()]
    # before the file itself: whatever ends the process in between, the run knows what is its own
    write_atomically(folder / DELIVERED, json.dumps(list(dict.fromkeys(known))).encode())
    write_atomically(target, adapters)


def _delivered(folder: Path) -> list[str]:
    """A damaged list is none: then nothing is written over."""
    try:
        found = read_json(folder / DELIVERED)
    except (OSError, ValueError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
