"""Nothing trained is overwritten: which adapters are a run's own, and how they leave its folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch

from ..files.checkpoint import about, load_checkpoint, save_checkpoint
from ..files.parse import read_json
from ..files.weights import write_atomically
from .checkpointing import states
from .config import TrainConfig
from .loop import BEST, FINAL
from .provenance import model_card, provenance

DELIVERED = "delivered.json"  # in the run's folder: the SHA-256 of every adapters file that it wrote elsewhere


def has_trained(folder: Path) -> bool:
    """Whether the run has left anything that another run would overwrite. A run's folder has one set of settings from then on."""
    return bool(states(folder)) or any((folder / name).exists() for name in (BEST, FINAL, DELIVERED))


def refuse_foreign(folder: Path, target: Path) -> None:
    """ValueError if a file `target` is there and the run of `folder` has not written it."""
    if not target.exists():
        return
    mine = {*_delivered(folder), *(_digest(folder / name) for name in (BEST, FINAL) if (folder / name).is_file())}
    if _digest(target) not in mine:
        raise ValueError(
            f"{target.name} in {target.parent} is not from this run, so it is not overwritten; give the run another name, or move "
            "the file away."
        )


def deliver(folder: Path, adapters: Path, target: Path, cfg: TrainConfig) -> None:
    """Writes adapters of the run of `folder`, which `cfg` trained, to `target`, and their model card beside it.

    ValueError as `refuse_foreign`: the file may have come meanwhile.
    """
    refuse_foreign(folder, target)
    known = provenance(cfg, about(adapters))
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / target.name
        save_checkpoint(load_checkpoint(adapters), made, torch.float16 if cfg.half else None, known)
        _write(folder, made.read_bytes(), target)
    card = target.with_suffix(".md")
    if not card.exists():  # somebody may have written in it
        write_atomically(card, model_card(target.stem, known, cfg.half).encode())


def _write(folder: Path, adapters: bytes, target: Path) -> None:
    known = [*_delivered(folder), hashlib.sha256(adapters).hexdigest()]
    # before the file itself: whatever ends the process in between, the run knows its own files
    write_atomically(folder / DELIVERED, json.dumps(list(dict.fromkeys(known))).encode())
    write_atomically(target, adapters)


def _delivered(folder: Path) -> list[str]:
    """A damaged list counts as empty: then nothing is overwritten."""
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
