#!/usr/bin/env python3
"""Writes the mini models, which some workflows name, into a ComfyUI's models folder. Run it with ComfyUI's Python:

    python scripts/mini_models.py ComfyUI/models

A base, a FlexIP checkpoint and two encoders, 20 MB together, made on the spot. They are untrained: they draw coloured noise and only
show that a workflow runs. A file that is there is never replaced. The exit code is 1 if they cannot be written.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flexip_core
from flexip_core.files.weights import read_tensors
from flexip_core.untrained import mini


def write_mini_models(models: Path) -> list[Path]:
    """The files that were not there yet. Nothing is written where one of them is another file."""
    if not models.is_dir():
        raise ValueError(
            f"There is no folder {models}. Name the models folder of your ComfyUI, such as ComfyUI/models."
        )
    if not (models / "checkpoints").is_dir():
        raise ValueError(
            f"{models} is not a ComfyUI's models folder: it has no folder checkpoints. Name the folder models inside ComfyUI's."
        )
    with tempfile.TemporaryDirectory(dir=models, prefix=".flexip-mini-") as folder:
        mini.make_mini_models(folder)
        made = {models / path.relative_to(folder): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        for target, source in made.items():
            if target.exists() and not same_tensors(target, source):
                raise ValueError(
                    f"{target} is there and is not the mini model of that name, so nothing was written. Move or rename it, and run this again."
                )
        new = [target for target in made if not target.exists()]
        for target in new:
            target.parent.mkdir(exist_ok=True)
            os.replace(made[target], target)
    return new


def same_tensors(path: Path, made: Path) -> bool:
    """Not the bytes: those of a file's metadata differ from run to run."""
    try:
        there = read_tensors(path)
    except ValueError:  # not a weight file
        return False
    wanted = read_tensors(made)
    return there.keys() == wanted.keys() and all(
        there[name].dtype == value.dtype and torch.equal(there[name], value) for name, value in wanted.items()
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODELS", type=Path, help="the folder models of ComfyUI")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        written = write_mini_models(options.models)
    except (ValueError, OSError) as error:
        logging.error("%s", error)
        return 1
    for path in written:
        logging.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    logging.info(
        "%s They are untrained: what they draw is coloured noise. Press R in ComfyUI to see them.",
        "All mini models are there." if written else "All mini models were there already, nothing was written.",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
