#!/usr/bin/env python3
"""Trains the world of characters, from a package of drawings to adapters. Each command goes on where it stopped.

    npm install --ignore-scripts @dicebear/open-peeps@9.4.3       the drawings; pip install resvg-py==0.5.0
    python scripts/characters.py drawings node_modules/@dicebear/open-peeps
    python scripts/characters.py judge                            what reads parts and staging off a picture
    python scripts/characters.py encoders                         what reads references: CLIP and DINO stand-ins
    python scripts/characters.py base                             UNet and text encoder; samples as it goes
    python scripts/characters.py measure                          does the base draw what it is told? (stop rules M1 and M2)
    python scripts/characters.py train outputs-jitter --seed 1    adapters; also tokens, -overlap, -swapped, and ip
    python scripts/characters.py evaluate outputs-jitter --seed 1
    python scripts/characters.py lines outputs-jitter --seed 1    the pass lines, against ip of that seed
    python scripts/characters.py all                              everything after the drawings, one after the other

Run it with ComfyUI's Python plus diffusers. Everything is kept in --home. With --device cuda it takes minutes: only the drawings
travel, scenes are rendered there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small, more threads only cost time
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # flexip_core
from PIL import Image

from flexip_core.characters import (
    base,
    drawings,
    encoders,
    files,
    judge,
    lines,
    measure,
    runs,
    scenes,
    scores,
    sweep,
    task,
)
from flexip_core.characters.codec import Codec
from flexip_core.characters.render import render
from flexip_core.characters.run import Run, average_of, state_of
from flexip_core.files.checkpoint import load_checkpoint
from flexip_core.files.weights import write_atomically
from flexip_core.network.adapters import ADAPTERS
from flexip_core.training.__main__ import make_task
from flexip_core.training.loop import FINAL, Trainer

WINNER = "outputs-jitter"  # until screening says otherwise
STAGE_DEFAULTS = {"sample_every": 600, "pictures": measure.PICTURES, "steps": runs.STEPS}
SHOWN_CASES = 8
CODEC_SEED, SAMPLE_SEED, JUDGE_SEED = 3, 7, 77
JUDGED, JUDGED_EVERY = 1024, 1000
SAMPLES, COLUMNS, ENLARGED = 24, 12, 2  # of a sheet of samples
Options = argparse.Namespace


def main() -> int:
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    options.home.mkdir(parents=True, exist_ok=True)
    try:
        options.command(options)
    except ValueError as error:
        logging.error("%s", error)
        return 1
    return 0


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=REPO / ".flexip" / "characters", help="default: %(default)s")
    parser.add_argument(
        "--save-every", type=int, default=100, help="steps between states of a training (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", help="cuda takes minutes where a CPU takes hours (default: %(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    one = commands.add_parser("drawings", help="rasterise the package's drawings, once")
    one.add_argument("package", type=Path, help="the unpacked npm package @dicebear/open-peeps")
    one.set_defaults(command=make_drawings)
    one = commands.add_parser("show", help="draw a sheet of scenes")
    one.add_argument("picture", type=Path, help="the file to write, .png or .webp")
    one.set_defaults(command=show)
    one = commands.add_parser("judge", help="train the judge, and measure it on held-out characters")
    one.set_defaults(command=train_judge)
    one = commands.add_parser("base", help="train the base")
    one.add_argument("--sample-every", type=int, default=600, help="steps between sheets (default: %(default)s)")
    one.set_defaults(command=train_base)
    one = commands.add_parser("encoders", help="train the CLIP stand-in, and make the DINO one")
    one.set_defaults(command=make_encoders)
    for name, function, about in (
        ("train", train_adapters, "train adapters"),
        ("evaluate", evaluate, "sweep the gate of trained adapters over held-out characters"),
        ("lines", print_lines, "what was evaluated, against the lines set before"),
    ):
        one = commands.add_parser(name, help=about)
        one.add_argument("run", help="outputs or tokens, with -jitter or -overlap, -swapped; or ip")
        one.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
        one.add_argument("--steps", type=int, default=runs.STEPS, help="(default: %(default)s)")
        one.set_defaults(command=function)
    one = commands.add_parser("all", help="judge, encoders, base, adapters and their evaluation")
    one.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the adapters (default: 1 2 3)")
    one.set_defaults(command=make_all)
    one = commands.add_parser("measure", help="what the judge finds in the base's pictures")
    one.add_argument("--pictures", type=int, default=measure.PICTURES, help="(default: %(default)s)")
    one.set_defaults(command=measure_base)
    return parser.parse_args()


def make_drawings(options: Options) -> None:
    path = options.home / files.DRAWINGS
    drawings.save(drawings.make(options.package), path)
    logging.info("%s: %d KB.", path, path.stat().st_size // 1000)


def show(options: Options) -> None:
    """Two characters staged anew, then others."""
    layers = drawings.load(options.home / files.DRAWINGS)
    g = torch.Generator().manual_seed(SAMPLE_SEED)
    people = scenes.characters(2 + COLUMNS, g)
    order = torch.tensor([0] * 6 + [1] * 6 + list(range(2, 2 + COLUMNS)))
    staged = scenes.stage({part: values[order] for part, values in people.items()}, g)
    image_of(render(layers, staged), COLUMNS).save(options.picture)


def train_judge(options: Options) -> None:
    layers = drawings.load(options.home / files.DRAWINGS).to(options.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(judge.PLAN.seed)
        model = judge.Judge().to(options.device)
    run = Run(judge.PLAN, model, judge.JudgeLoss(layers, judge.PLAN.batch))
    for done in run.until_done(options.home / files.JUDGE_STATE, save_every=options.save_every):
        if done % JUDGED_EVERY == 0 or done == judge.PLAN.steps:
            files.save(run.average, options.home / files.JUDGE)
            report_judge(options.home, layers)


def report_judge(home: Path, layers: drawings.Drawings) -> None:
    critic = files.load(judge.Judge(), home / files.JUDGE).to(layers.device)
    for split in ("test", "hard"):
        agreed = judge.on_real_pictures(critic, layers, JUDGED, JUDGE_SEED, split)
        shares = ", ".join(f"{slot} {share:.3f}" for slot, share in judge.shares(agreed).items())
        logging.info("Judge on %d real pictures, %s split: %s.", JUDGED, split, shares)


def measure_base(options: Options) -> None:
    """Of a finished base, or of the average in the newest state."""
    layers = drawings.load(options.home / files.DRAWINGS).to(options.device)
    critic = files.load(judge.Judge(), options.home / files.JUDGE).to(options.device)
    model = newest_base(options.home).to(options.device)
    found = measure.of_base(model, the_codec(options.home, layers), layers, critic, options.pictures)
    print(measure.table(found))
    about = state_of(options.home / files.BASE_STATE)
    found |= {"step": about["done"], "cpu_seconds": about["seconds"]}
    print(f"Step {found['step']}, {found['cpu_seconds'] / 60:.0f} minutes of CPU; M1 {found['M1']}, M2 {found['M2']}.")
    write(options.home / "results" / f"base_{found['step']:05d}.json", found)


def newest_base(home: Path) -> base.Generator:
    if (home / files.BASE).exists():
        return files.load(base.new_generator(0), home / files.BASE)
    state = home / files.BASE_STATE
    if not state.exists():
        raise ValueError(f"There is no base in {home} yet. Train it first: python scripts/characters.py base.")
    return files.with_weights(base.new_generator(0), average_of(state))


def train_base(options: Options) -> None:
    layers = drawings.load(options.home / files.DRAWINGS).to(options.device)
    codec = the_codec(options.home, layers)
    model = base.new_generator(base.PLAN.seed).to(options.device)
    run = Run(base.PLAN, model, base.BaseLoss(layers, codec, base.PLAN.batch))
    (options.home / "samples").mkdir(exist_ok=True)
    for done in run.until_done(options.home / files.BASE_STATE, save_every=options.save_every):
        files.save(run.average, options.home / files.BASE_AVERAGE, half=True)
        if done % options.sample_every == 0 or done == base.PLAN.steps:
            average = files.with_weights(base.new_generator(0), run.average).to(options.device)
            sheet(average, codec, layers).save(options.home / "samples" / f"base_{done:05d}.png")
    files.save(run.average, options.home / files.BASE)


def make_encoders(options: Options) -> None:
    layers = drawings.load(options.home / files.DRAWINGS).to(options.device)
    if not (options.home / files.DINO_FILE).exists():
        g = torch.Generator().manual_seed(CODEC_SEED)
        pictures = render(layers, scenes.stage(scenes.characters(512, g), g)).cpu()
        files.save(encoders.make_dino(pictures).model.state_dict(), options.home / files.DINO_FILE)
    plan = encoders.PLAN
    run = Run(plan, encoders.untrained(plan.seed).to(options.device), encoders.ContrastLoss(layers, plan.batch))
    for done in run.until_done(options.home / files.CLIP_STATE, save_every=options.save_every):
        if done == plan.steps:
            task.save_contrast(run.average, options.home)
            clip = task.load_contrast(options.home).to(options.device)
            share = encoders.top1(clip, layers, 256, JUDGE_SEED)
            logging.info("CLIP stand-in: own caption the nearest of 256 held-out ones in %.3f.", share)


def train_adapters(options: Options) -> None:
    cfg = dataclasses.replace(
        runs.config(options.run, options.seed, options.home, options.steps), device=options.device
    )
    if (Path(cfg.folder) / FINAL).exists():
        return
    # for so few tokens plain attention is faster on a CPU than the fused one
    with sdpa_kernel(SDPBackend.MATH) if options.device == "cpu" else contextlib.nullcontext():
        Trainer(cfg, *make_task(cfg)).run(resume=True)


def evaluate(options: Options) -> None:
    name, seed, home = options.run, options.seed, options.home
    network = load_checkpoint(runs.adapters_file(home, name, seed, options.steps)).to(options.device)
    world = task.load_world(home).to(options.device)
    world.unet.bfloat16()  # the sampler then computes in half precision
    tools = task.load_instruments(home, options.device)
    adapters = ("preservation",) if name == runs.BASELINE else ADAPTERS
    found: dict[str, Any] = {"run": name, "seed": seed, "steps": options.steps}
    stem = home / "results" / f"{name}_{seed}_{options.steps}"
    for mode in scores.MODES:
        swept = sweep.gate_sweep(world, network, mode, tools, scores.Setup(seed=777 + seed), adapters)
        found[mode] = sweep.summary(swept)
        write(stem.with_suffix(".json"), found)
        few = slice(0, None, 2)  # of eleven gates
        rows = torch.cat([swept.tests.reference[None], swept.pictures[few]])[:, :SHOWN_CASES].movedim(0, 1)
        image_of(rows.flatten(0, 1), rows.shape[1]).save(stem.with_name(f"{stem.name}_{mode}.png"))
        logging.info("%s: parts %s of %.3f.", mode, found[mode]["curves"]["parts"], found[mode]["real"]["parts"])
    found["controls"] = sweep.controls(world, network, tools, scores.Setup(seed=777 + seed), adapters)
    write(stem.with_suffix(".json"), found)


def print_lines(options: Options) -> None:
    results = options.home / "results"
    base_results = sorted(results.glob("base_*.json"))
    if not base_results:
        raise ValueError("The base is not measured yet: python scripts/characters.py measure.")
    of_base = json.loads(base_results[-1].read_text())

    def read(run: str) -> dict[str, Any] | None:
        path = results / f"{run}_{options.seed}_{options.steps}.json"
        return {**json.loads(path.read_text()), "base": of_base} if path.exists() else None

    found = read(options.run)
    if found is None:
        raise ValueError(f"{options.run} with seed {options.seed} is not evaluated yet.")
    for outcome in lines.outcomes(found, read(runs.BASELINE)):
        print(outcome)


def make_all(options: Options) -> None:
    for command in (train_judge, make_encoders, train_base, measure_base):
        command(argparse.Namespace(**{**STAGE_DEFAULTS, **vars(options)}))
    for seed in options.seeds:
        names = (WINNER, runs.BASELINE, f"{WINNER}-swapped") if seed == options.seeds[0] else (WINNER, runs.BASELINE)
        for command in (train_adapters, evaluate):
            for name in names:
                command(argparse.Namespace(**{**STAGE_DEFAULTS, **vars(options), "run": name, "seed": seed}))


def the_codec(home: Path, layers: drawings.Drawings) -> Codec:
    """The one in `home`, learned first if there is none."""
    path = home / files.CODEC
    if not path.exists():
        g = torch.Generator().manual_seed(CODEC_SEED)
        pictures = render(layers, scenes.stage(scenes.characters(768, g), g))
        files.save(Codec.learned(pictures[:512]).state_dict(), path)
        codec = files.load(Codec(), path)
        error = (codec.to(pictures.device).decode(codec.encode(pictures[512:])) - pictures[512:]).square().mean()
        logging.info("Codec: %.1f dB on other pictures.", 10 * torch.log10(4 / error).item())
    return files.load(Codec(), path).to(layers.device)


def sheet(model: base.Generator, codec: Codec, layers: drawings.Drawings) -> Image.Image:
    """Odd rows: held-out characters. Even rows: what the base draws from their full captions."""
    g = torch.Generator().manual_seed(SAMPLE_SEED)
    shown = scenes.stage(scenes.characters(SAMPLES, g, "test"), g)
    drawn = base.draw(model, codec, scenes.captions(shown), base.noise_for(SAMPLES, SAMPLE_SEED))
    rows = torch.stack([render(layers, shown), drawn]).unflatten(1, (-1, COLUMNS)).movedim(0, 1).flatten(0, 2)
    return image_of(rows, COLUMNS)


def write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(data, indent=1).encode())


def image_of(pictures: torch.Tensor, columns: int) -> Image.Image:
    """(n, 3, h, w) in -1..1 in rows of `columns`, enlarged"""
    rows = [torch.cat(list(row), 2) for row in pictures.split(columns)]
    pixels = ((torch.cat(rows, 1).cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()
    image = Image.fromarray(pixels)
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.BICUBIC)


if __name__ == "__main__":
    sys.exit(main())
