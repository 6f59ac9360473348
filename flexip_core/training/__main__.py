"""python -m flexip_core.training run config.toml [--resume] [--export adapters.safetensors] [--allow-code]
torchrun --nproc-per-node 4 -m flexip_core.training run config.toml    (or accelerate launch; 4 GPUs)
python -m flexip_core.training export run_folder adapters.safetensors [--last]
python -m flexip_core.training memory [config.toml] --base SD1.5 --size 512 [--ranks 4]  what one GPU has to hold
python -m flexip_core.training check data [--size 512] [--sheet pairs.png]               what is wrong with the pictures
python -m flexip_core.training cache config.toml                                         latents, texts and features, once
python -m flexip_core.training import KIND source data                                   known layouts of others
python -m flexip_core.training pack data shards  |  unpack shards data                   WebDataset shards
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch

from ..files.weights import write_atomically
from .background import CONFIG, STOP, locked, read_config_of, refuse_overwriting
from .base import Task
from .cache import MOST_TEXTS
from .checkpointing import config_of, export, states
from .config import TrainConfig, read_config
from .delivery import deliver, refuse_foreign
from .importers import KINDS, WAYS, import_data
from .loop import BEST, FINAL, Trainer
from .progress import progress_line
from .ranks import TrainingError, joined
from .stores import FOLLOW_LINKS

OURS = "flexip_core"
USUAL = TrainConfig(steps=1, batch=4, seed=0, folder="", precision="bf16", recompute=True)
"""What Train FlexIP begins with, for `memory` without a config."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    before = FOLLOW_LINKS.set(getattr(options, "follow_links", False))
    try:
        return options.command(options) or 0
    except (ValueError, TrainingError, OSError) as error:  # anything else is told with where it came from
        logging.error("%s", error)
        return 1
    finally:
        FOLLOW_LINKS.reset(before)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flexip_core.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(function, help: str, *names: str) -> argparse.ArgumentParser:
        one = commands.add_parser(function.__name__.removesuffix("_"), help=help)
        for name in names:
            one.add_argument(name, type=None if name == "config" else Path)
        one.set_defaults(command=function)
        return one

    one = command(run, "train; SIGTERM and Ctrl+C save the state and stop", "config")
    one.add_argument(
        "--resume", action="store_true", help="continue from the newest state in the run's folder, if there is one"
    )
    one.add_argument("--export", type=Path, metavar="FILE", help="where the best adapters go when it is done")
    one.add_argument(
        "--allow-code",
        action="store_true",
        help="let the config's [task] make name a function outside flexip_core; it runs with all that you may do, so read it before",
    )

    one = command(export_, "write the adapters of a run's newest state as a file for ComfyUI", "folder", "file")
    one.add_argument("--last", action="store_true", help="the last weights instead of the averaged ones")
    one.add_argument("--half", action="store_true", help="float16: half the size (in a config: half = true)")

    one = command(memory, "count what one GPU has to hold")
    one.add_argument(
        "config",
        nargs="?",
        help=f"left out: batch {USUAL.batch}, {USUAL.precision}, recompute, as in Train FlexIP",
    )
    one.add_argument("--base", required=True, help="SD1.5 or SDXL")
    one.add_argument("--size", type=int, required=True, help="side of the pictures in pixels")
    one.add_argument("--ranks", type=int, default=1, help="GPUs that share a batch (default: %(default)s)")

    one = command(check, "report what is wrong with training pictures", "data")
    one.add_argument(
        "--size", type=int, default=512, help="size that they are trained at, in pixels (default: %(default)s)"
    )
    one.add_argument("--sheet", type=Path, help="a picture of some pairs, to look at")
    one.add_argument("--pairs", type=int, default=8, help="on the sheet (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0, help="which pairs (default: %(default)s)")

    one = command(cache, "encode pictures and captions of a config's data once, into its cache folder", "config")
    one.add_argument("--patches", action="store_true", help="DINO's patches, too: 512 KB per reference")
    one.add_argument("--dry-run", action="store_true", help="only say what it would take")
    one.add_argument("--texts", type=int, default=MOST_TEXTS, help="most that are kept (default: %(default)s)")

    one = command(import_, "bring pictures in a known layout into ours")
    one.add_argument("kind", help=f"the layout: {', '.join(KINDS)}")
    for name in ("source", "data"):
        one.add_argument(name, type=Path)
    one.add_argument(
        "--way",
        choices=WAYS,
        default=WAYS[0],
        help="link: hard links where possible, which take no space (default: %(default)s)",
    )
    one.add_argument("--template", help="of paths, for co3d")
    one.add_argument("--pictures", type=Path, help="where an ip_adapter list's files lie")
    one.add_argument("--to", choices=("variant", "invariant"), help="for kohya folders")
    one.add_argument("--views", type=int, help="at most this many of each subject")

    one = command(pack, "write a folder of pictures as WebDataset shards", "data", "shards")
    one.add_argument("--megabytes", type=int, default=1024, help="of a shard (default: %(default)s)")
    command(unpack, "write shards as a folder of pictures", "shards", "data")
    for name in ("run", "check", "cache", "pack", "import"):
        commands.choices[name].add_argument(
            "--follow-links",
            action="store_true",
            help="read what links inside the data point at, wherever that lies; without it links are refused",
        )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    cfg = read_config(options.config)
    folder = Path(cfg.folder)
    with joined(cfg.device) as ranks:
        if not ranks.first:
            logging.getLogger().setLevel(logging.WARNING)
        cfg = dataclasses.replace(cfg, device=ranks.device(cfg.device))
        with locked(folder, ranks):
            with ranks.together():
                if ranks.first:
                    refuse_overwriting(cfg, options.export)
                trainer = Trainer(cfg, *make_task(cfg, options.allow_code), ranks=ranks)
                if ranks.first:
                    write_atomically(folder / CONFIG, json.dumps(cfg.to_dict(), indent=1).encode())
            if cfg.precision == "bf16":
                torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32, such as the VAE
            try:
                with progress_line(trainer) as shown:
                    done = trainer.run(options.resume, (folder / STOP).exists, shown)
            finally:
                (folder / STOP).unlink(missing_ok=True)
            if done and options.export and ranks.first:
                best = folder / BEST if (folder / BEST).exists() else folder / FINAL
                deliver(folder, best, options.export, cfg)
                logging.info("The adapters are in %s.", options.export)


def export_(options: argparse.Namespace) -> None:
    found = states(options.folder)
    if not found:
        raise ValueError(f"{options.folder} holds no training state; give the folder of a run.")
    refuse_foreign(options.folder, options.file)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / options.file.name
        export(found[-1], made, "weights" if options.last else "average")
        cfg = read_config_of(options.folder) or TrainConfig.from_dict(config_of(found[-1]))
        deliver(options.folder, made, options.file, dataclasses.replace(cfg, half=cfg.half or options.half))


def memory(options: argparse.Namespace) -> None:
    from .memory import report

    cfg = read_config(options.config) if options.config else USUAL
    logging.info("%s", report(cfg, options.base, options.size, options.ranks))


def check(options: argparse.Namespace) -> int:
    from .check import check
    from .sheet import contact_sheet_of_pairs
    from .sources import make_source

    found = check(options.data, options.size)
    logging.info("%s", found.text())
    if options.sheet and found.ok:
        contact_sheet_of_pairs(make_source(options.data, options.size), options.pairs, options.seed).save(options.sheet)
        logging.info("Pairs to look at are in %s.", options.sheet)
    return 0 if found.ok else 1


def cache(options: argparse.Namespace) -> None:
    from .sd import fill_cache

    cfg = read_config(options.config)
    fill_cache(cfg, options.patches, options.dry_run, options.texts)


def import_(options: argparse.Namespace) -> None:
    number = import_data(
        options.kind,
        options.source,
        options.data,
        options.way,
        options.template,
        options.pictures,
        options.to,
        options.views,
    )
    logging.info("%d pictures are in %s.", number, options.data)


def pack(options: argparse.Namespace) -> None:
    from .shards import pack

    made = pack(options.data, options.shards, options.megabytes * 2**20)
    logging.info("%d shards are in %s.", len(made), options.shards)


def unpack(options: argparse.Namespace) -> None:
    from .shards import unpack

    logging.info("%d files are in %s.", unpack(options.shards, options.data), options.data)


def make_task(cfg: TrainConfig, allow_code: bool = False) -> Task:
    """What the config's `[task]` names: a function in an importable module. It gets the config as `run` if it wants it.

    A config is data: unless `allow_code` says so, only the functions `make` of flexip_core are called, and nothing else is imported.
    """
    options = dict(cfg.task)
    module, _, function = str(options.pop("make", "")).partition(":")
    if not module or not function:
        raise ValueError('the config lacks [task] make = "module:function", which gives base, data and probe; add it.')
    if not allow_code and not (module.startswith(f"{OURS}.") and function == "make"):
        raise ValueError(
            f"[task] make = {cfg.task['make']!r} is code outside {OURS}, which would run with all that you may do. If you know "
            "it and trust it, add --allow-code; a config from somebody else does not need it."
        )
    try:
        make = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"[task] make = {cfg.task['make']!r} does not name a function: {error}.") from None
    more = {"run": cfg} if "run" in inspect.signature(make).parameters else {}
    try:
        return make(device=cfg.device, **more, **options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error) or "required positional argument" in str(error):
            raise ValueError(f"[task] does not fit {module}:{function}: {error}.") from None
        raise


if __name__ == "__main__":
    sys.exit(main())
