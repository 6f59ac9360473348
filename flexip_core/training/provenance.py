"""Where trained adapters come from: in the metadata of their file, and in a model card beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.version import pack_version
from ..files.weights import sha256
from .config import TrainConfig
from .dataset import scan

FILES = ("checkpoint", "clip_vision", "dino")  # of [task]
SETTINGS = ("steps", "batch", "precision", "train_adapters", "mix", "gates", "dropout", "optimizer", "network", "seed")
NO_LICENSE = "not stated: ask whoever trained it, and mind the license of the base and the rights in the pictures"


def provenance(cfg: TrainConfig, trained: Mapping[str, Any]) -> dict[str, Any]:
    """`trained`: what the run says of these weights, such as {"steps": 2000}. Hashes every file that the task names, once."""
    settings = cfg.to_dict()
    data = cfg.task.get("data")
    return {
        **trained,
        "pack": pack_version(),
        "license": cfg.license or NO_LICENSE,
        "settings": {name: settings[name] for name in SETTINGS},
        "files": {name: _file(cfg.task[name]) for name in FILES if isinstance(cfg.task.get(name), str)},
        "data": _data(data) if isinstance(data, str) else None,
    }


def _file(path: str) -> dict[str, str]:
    """Its name only: a path tells strangers about somebody's disk."""
    try:
        with open(path, "rb") as file:
            return {"name": Path(path).name, "sha256": sha256(file)}
    except OSError:
        return {"name": Path(path).name, "sha256": "unknown: the file is gone"}


def _data(folder: str) -> dict[str, Any] | None:
    """How much, and a hash of every picture's and caption's name and size: the pictures themselves may be terabytes."""
    try:
        found = scan(folder)
        digest = hashlib.sha256()
        for name in sorted(
            {name for _, view in found.views() for name in (view.file, view.caption, view.mask) if name}
        ):
            with found.store.open(name) as file:
                digest.update(f"{name}\t{file.seek(0, 2)}\n".encode())
    except (ValueError, OSError):
        return None
    subjects = {group.name.rpartition("/")[2]: len(group.views) for group in found.subjects}
    return {
        "sha256 of names and sizes": digest.hexdigest(),
        "subjects": len(subjects),
        "pictures of subjects": sum(subjects.values()),
        "loose pictures": sum(len(group.views) for group in found.loose),
    }


def model_card(name: str, about: Mapping[str, Any], half: bool) -> str:
    """Markdown, for the page where the file is published; what only a person knows is asked for."""
    settings, data, files = about["settings"], about["data"], about["files"]
    gates = "; ".join(f"{kind} {_range(settings['gates'][kind])}" for kind in ("invariant", "variant"))
    rows = [
        ("steps", f"{about['steps']} of {settings['steps']}, batch {settings['batch']}, learning rate {settings['optimizer']['lr']:g}"),
        ("weights", f"{about['weights']}, {'float16' if half else 'float32'}"),
        ("gates", gates),
        ("variant pairs", f"{settings['mix']:.0%}"),
        ("dropped", f"reference {settings['dropout']['image']:.0%}, text {settings['dropout']['text']:.0%}, both {settings['dropout']['both']:.0%}, phrases {settings['dropout']['phrase']:.0%}"),
        *((role, f"{file['name']}, sha256 {file['sha256']}") for role, file in files.items()),
        *((("data", ", ".join(f"{value} {what}" for what, value in data.items() if isinstance(value, int)) + f"; sha256 of names and sizes {data['sha256 of names and sizes']}"),) if data else ()),
        ("made with", f"FlexIP for ComfyUI {about['pack']['version']}, commit {about['pack']['commit']}"),
    ]  # fmt: skip
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""# {name}

FlexIP adapters for ComfyUI: put the file into `models/flexip` and choose it in *Load FlexIP Adapters*. They were trained on one base;
others of its family work as far as they are alike.

License: {about["license"]}

| | |
| --- | --- |
{table}

## To be written by whoever publishes this

What the pictures show, where they come from and who may use them; what the adapters are good at and what they fail at; how they were
measured, with the command.
"""


def _range(value: list[float]) -> str:
    return f"{value[0]:g}" if value[0] == value[1] else f"{value[0]:g} to {value[1]:g}"
