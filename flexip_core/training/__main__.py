"""python -m flexip_core.training run config.toml [--resume]
python -m flexip_core.training export run_folder adapters.safetensors [--last]
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from pathlib import Path

from .base import Task
from .checkpointing import export, states
from .config import TrainConfig, read_config
from .loop import Trainer, TrainingError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flexip_core.training", description="Train FlexIP adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train; SIGTERM and Ctrl+C save the state and stop")
    run.add_argument("config", help="a TOML file")
    run.add_argument(
        "--resume", action="store_true", help="go on from the newest state in the run's folder, if there is one"
    )
    out = commands.add_parser("export", help="write the adapters of a run's newest state as a file for ComfyUI")
    out.add_argument("folder", help="of the run")
    out.add_argument("file", help="the .safetensors to write")
    out.add_argument("--last", action="store_true", help="the last weights instead of the averaged ones")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if options.command == "run":
            cfg = read_config(options.config)
            task = make_task(cfg)
            Trainer(cfg, *task).run(resume=options.resume)
        else:
            found = states(options.folder)
            if not found:
                raise ValueError(f"{options.folder} holds no training state; give the folder of a run.")
            export(found[-1], Path(options.file), "weights" if options.last else "average")
    except (ValueError, TrainingError) as error:
        logging.error("%s", error)
        return 1
    return 0


def make_task(cfg: TrainConfig) -> Task:
    """What the config's `[task]` names: a function in an importable module."""
    options = dict(cfg.task)
    module, _, function = str(options.pop("make", "")).partition(":")
    if not module or not function:
        raise ValueError('the config lacks [task] make = "module:function", which gives base, data and probe; add it.')
    try:
        make = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"[task] make = {cfg.task['make']!r} does not name a function: {error}.") from None
    return make(device=cfg.device, **options)


if __name__ == "__main__":
    sys.exit(main())
