#!/usr/bin/env python3
"""Trains the mini world and measures what the gate does in it. One CPU core is enough.

    python scripts/mini_world.py base                       the frozen base, its encoders and the judge
    python scripts/mini_world.py train outputs --seed 1     adapters: outputs, tokens, with -jitter and -swapped behind; ip
    python scripts/mini_world.py evaluate outputs --seed 1
    python scripts/mini_world.py causes outputs --seed 1    where single pictures jump: sweeps with parts of the gate held still
    python scripts/mini_world.py cures outputs --seed 1     other ways to turn the gate, and what they leave of its range
    python scripts/mini_world.py table                      everything evaluated so far, and the pass lines
    python scripts/mini_world.py export outputs --seed 1    into the pack, with ip of that seed: for the demo node and the evaluation

Run it with ComfyUI's Python plus diffusers. A stage that was interrupted goes on where it stopped when it is started again; one
that is finished does nothing. Everything is kept in --folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small, more threads only cost time
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # flexip_core
from PIL import Image

from flexip_core.files.checkpoint import load_checkpoint, save_checkpoint
from flexip_core.files.weights import read_tensors
from flexip_core.mini_world import causes, cures, encoders, files, judge, runs, table, task, world
from flexip_core.mini_world.base import STEPS, BaseRun
from flexip_core.mini_world.measure import MODES, Setup, Sweep
from flexip_core.training.__main__ import make_task
from flexip_core.training.loop import FINAL, Trainer

COMMAND = shlex.join(["python", "scripts/mini_world.py", *sys.argv[1:]])
BASE_SEED, ENCODER_SEED, JUDGE_SEED = 5, 11, 23
SHOWN_CASES, SCALE = 8, 4  # of a contact sheet
Run = argparse.Namespace


def main() -> int:
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        if options.stage in OF_ONE_RUN.values() and not (options.folder / files.BASE).is_file():
            raise ValueError(
                f"There is no base in {options.folder} yet. Make it first: python scripts/mini_world.py base."
            )
        return options.stage(options)
    except ValueError as error:
        logging.error("%s", error)
        return 1


def parse() -> Run:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=REPO / ".flexip" / "mini_world", help="default: %(default)s")
    stages = parser.add_subparsers(required=True, metavar="stage")
    one = stages.add_parser("base", help="train the base, the CLIP stand-in and the judge, and measure the base")
    one.add_argument("--steps", type=int, default=STEPS)
    one.set_defaults(stage=make_base)
    for name, stage in OF_ONE_RUN.items():
        one = stages.add_parser(name)
        one.add_argument(
            "run", help="outputs, tokens, outputs-jitter, tokens-jitter, any of these with -swapped, or ip"
        )
        one.add_argument("--seed", type=int, default=1)
        one.add_argument("--steps", type=int, default=runs.ADAPTER_STEPS)
        one.set_defaults(stage=stage)
    one = stages.add_parser(
        "table", help="of all that is evaluated; --folder benchmarks/mini_world: of the repository's results"
    )
    one.add_argument("--seeds", type=int, nargs="+", help="only these")
    one.set_defaults(stage=print_table)
    return parser.parse_args()


def make_base(options: Run) -> int:
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / files.JUDGE).exists():
        with timed("Judge"):
            judge_model = judge.train(JUDGE_SEED)
        logging.info("Judge on held-out subjects: %s", judge.held_out_accuracy(judge_model, 512, 7))
        files.save(judge_model.state_dict(), folder / files.JUDGE)
    if not (folder / files.CLIP_FILE).exists():
        with timed("CLIP stand-in"):
            clip = encoders.train_clip(ENCODER_SEED)
        logging.info("CLIP stand-in: own caption nearest of 256 in %.3f", encoders.top1(clip, 256, 7))
        task.save_clip(clip, folder)
    if not (folder / files.DINO_FILE).exists():
        files.save(encoders.make_dino().model.state_dict(), folder / files.DINO_FILE)
    if not (folder / files.BASE).exists():
        stopped = until_asked()
        run = BaseRun(BASE_SEED, options.steps)
        if not run.run(folder / "base_state.safetensors", until=stopped):
            logging.info("Stopped; the state is saved.")
            return 0
        files.save(run.average, folder / files.BASE)
    if not (folder / "results" / "base.json").exists():
        with timed("Base measured"):
            result = runs.evaluate_base(task.load_world(folder), task.load_instruments(folder), runs.setup_for(0))
        runs.write_json(folder / "results" / "base.json", result, COMMAND)
        logging.info("Base: %s", result)
    return 0


def train(options: Run) -> int:
    cfg = runs.config(options.run, options.seed, options.folder, options.steps)
    if (Path(cfg.folder) / FINAL).exists():
        logging.info("%s is trained.", cfg.folder)
        return 0
    Trainer(cfg, *make_task(cfg)).run(resume=True)
    return 0


def evaluate(options: Run) -> int:
    result_file = options.folder / "results" / f"{options.run}_{options.seed}.json"
    with timed(f"{options.run}, seed {options.seed}"):
        base, tools = task.load_world(options.folder), task.load_instruments(options.folder)
        setup = runs.setup_for(options.seed)
        result, sweeps = runs.evaluate(
            base, tools, runs.adapters_file(options.folder, options.run, options.seed), options.run, setup
        )
    for mode, sweep in sweeps.items():
        contact_sheet(sweep, setup).save(result_file.with_name(f"{options.run}_{options.seed}_{mode}.png"))
    runs.write_json(result_file, {"run": options.run, "seed": options.seed, **result}, COMMAND)
    return 0


def find_causes(options: Run) -> int:
    name, seed, folder = options.run, options.seed, options.folder
    base, tools, network = (
        task.load_world(folder),
        task.load_instruments(folder),
        load_checkpoint(runs.adapters_file(folder, name, seed)),
    )
    for mode in MODES:
        with timed(f"{name}, seed {seed}, {mode}"):
            found = causes.measured(base, network, tools, runs.setup_for(seed), mode, runs.adapters_of(name))
        runs.write_json(folder / "causes" / f"{name}_{seed}_{mode}.json", found, COMMAND)
        for variant, numbers in found.items():
            logging.info("%s: %.2f, identity %s", variant, numbers["per_image_feature_step"], numbers["identity"][::5])
    return 0


def try_cures(options: Run) -> int:
    name, seed, folder = options.run, options.seed, options.folder
    base, tools, network = (
        task.load_world(folder),
        task.load_instruments(folder),
        load_checkpoint(runs.adapters_file(folder, name, seed)),
    )
    found = {}
    for mode in MODES:
        with timed(f"{name}, seed {seed}, {mode}"):
            found[mode] = cures.measured(base, network, tools, runs.setup_for(seed), mode, runs.adapters_of(name))
    runs.write_json(folder / "cures" / f"{name}_{seed}.json", {"run": name, "seed": seed, **found}, COMMAND)
    return 0


def contact_sheet(sweep: Sweep, setup: Setup) -> Image.Image:
    """Reference, then one column per gate; one row per case."""
    rows = torch.cat([setup.tests().reference[None], sweep.pictures])[:, :SHOWN_CASES]
    columns, cases = rows.shape[:2]
    pixels = rows.permute(1, 3, 0, 4, 2).reshape(cases, world.SIZE, columns * world.SIZE, 3).flatten(0, 1)
    image = Image.fromarray(((pixels + 1) * 127.5).round().byte().numpy())
    return image.resize((image.width * SCALE, image.height * SCALE), Image.NEAREST)


def print_table(options: Run) -> int:
    folder = options.folder / "results"
    folder = folder if folder.is_dir() else options.folder  # so are those in benchmarks/mini_world
    base, results = table.read_results(folder, options.seeds)
    if not results:
        raise ValueError(
            f"{folder} holds no results of such runs. Evaluate some first, or see those in the repository: --folder benchmarks/mini_world."
        )
    print(table.markdown(base, results))
    print(f"\n{table.cures_markdown(table.read_results(options.folder / 'cures', options.seeds)[1])}")
    return 0


def export(options: Run) -> int:
    """Half precision: what the demo shows is the same to the eye, and half as large."""
    for name in (files.BASE, files.CLIP_FILE, files.CLIP_TEXT, files.DINO_FILE, files.JUDGE):
        half = {key: value.half() for key, value in read_tensors(options.folder / name).items()}
        files.save(half, files.WEIGHTS / name)
    for run, name in ((options.run, files.ADAPTERS), (runs.BASELINE, files.IP_ADAPTER)):
        network = load_checkpoint(runs.adapters_file(options.folder, run, options.seed))
        save_checkpoint(network, files.WEIGHTS / name, torch.float16)
    size = sum(path.stat().st_size for path in files.WEIGHTS.glob("*.safetensors"))
    logging.info("%s: %.1f MB", files.WEIGHTS, size / 1e6)
    return 0


def until_asked() -> Any:
    """A function that becomes true after SIGTERM or Ctrl+C."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    return lambda: bool(asked)


OF_ONE_RUN = {"train": train, "evaluate": evaluate, "causes": find_causes, "cures": try_cures, "export": export}


class timed:
    """Logs how long its block took."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            logging.info("%s: %.0f s", self.what, time.perf_counter() - self.begin)


if __name__ == "__main__":
    sys.exit(main())
