"""The named training runs and how they are evaluated; scripts/mini_world.py starts them.

A name is a gate mode ("outputs", "tokens"), with "-jitter" if the gate of each row is drawn from its half instead of being one of
two numbers, and "-swapped" if the two kinds of data exchange their gates (a control). "ip" is the baseline: an IP-Adapter, that is
the preservation adapter alone at weight 1 on the same pairs, with as many trained numbers as FlexIP has.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..files.checkpoint import load_checkpoint
from ..files.weights import write_atomically
from ..network.adapters import ADAPTERS, FlexIPNetwork
from ..network.config import GATE_MODES
from ..training.config import TrainConfig
from ..training.loop import BEST, FINAL
from . import judge, measure, world
from .base import MiniBase
from .measure import Instruments, Setup, Sweep
from .sampling import draw

BASELINE = "ip"
TWO_POINT = {"invariant": 0.8, "variant": 0.2}
JITTER = {"invariant": [0.5, 1.0], "variant": [0.0, 0.5]}
NETWORK = {
    "resampler": {"width": 96, "depth": 1, "heads": 4, "dim_head": 24, "ff_mult": 4},
    "detail_tokens": 8,
    "semantic_tokens": 4,
    "cls_tokens": 4,
}
IP_NETWORK = {**NETWORK, "resampler": {"width": 128, "depth": 1, "heads": 4, "dim_head": 32, "ff_mult": 4}}
TRAINING = {
    "batch": 64,
    "start": "text",
    "mix": 0.5,
    "log_every": 100,
    "probe_every": 500,
    "checkpoint_every": 100,
    "keep": 1,
    # each word about the place is missing in every second caption: what the text leaves open, the gate decides
    "dropout": {"image": 0.05, "text": 0.05, "both": 0.05, "phrases": {"ground": 0.5, "corner": 0.5, "hue": 0.8}},
    "optimizer": {"lr": 1.5e-3, "warmup": 100, "cosine_from": 0.0},
    "ema": {"decay": 0.998, "power": 0.75},
}
ADAPTER_STEPS = 2000


def config(name: str, seed: int, folder: Path, steps: int = ADAPTER_STEPS) -> TrainConfig:
    """The run `name` in `folder`/runs, on the base and encoders in `folder`."""
    mode, *options = name.split("-")
    if (
        not set(options) <= {"jitter", "swapped"}
        or mode not in (*GATE_MODES, BASELINE)
        or (mode == BASELINE and options)
    ):
        raise ValueError(
            f"There is no run {name!r}; choose outputs or tokens, with -jitter and -swapped behind it if wanted, or ip."
        )
    gates = JITTER if "jitter" in options else TWO_POINT
    if "swapped" in options:
        gates = {"invariant": gates["variant"], "variant": gates["invariant"]}
    if mode == BASELINE:
        ones = {"invariant": 1.0, "variant": 1.0}
        extra: dict[str, Any] = {"gates": ones, "network": IP_NETWORK, "train_adapters": ["preservation"]}
    else:
        extra = {"gates": gates, "network": {**NETWORK, "gate_mode": mode}}
    return TrainConfig.from_dict(
        {
            **TRAINING,
            **extra,
            "steps": steps,
            "seed": seed,
            "folder": str(run_folder(folder, name, seed)),
            "task": {"make": "flexip_core.mini_world.task:make", "folder": str(folder)},
        }
    )


def run_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / f"{name}_{seed}"


def adapters_file(folder: Path, name: str, seed: int) -> Path:
    """The weights that the probe found best in a finished run."""
    run = run_folder(folder, name, seed)
    if not (run / FINAL).exists():
        raise ValueError(f"{run} holds no finished run; train it first.")
    return run / BEST


def adapters_of(name: str) -> tuple[str, ...]:
    return ("preservation",) if name == BASELINE else ADAPTERS


def setup_for(seed: int) -> Setup:
    """A run of another seed is tested on other subjects, places and noises; runs of one seed on the same."""
    return Setup(test_seed=777 + seed, noise_seed=seed)


def evaluate_base(base: MiniBase, tools: Instruments, setup: Setup) -> dict[str, Any]:
    """The bare base on held-out subjects: captions that name everything but the hue, and with the hue word."""
    tests = setup.tests()
    out: dict[str, Any] = {"about": dataclasses.asdict(setup)}
    for title, captions in (("", tests.prompts("conflict")), ("_with_hue", world.captions(tests.wanted))):
        pictures = draw(base, captions, setup.noise(), steps=setup.steps, cfg=setup.cfg)
        scores = tools.scores(pictures, tests, captions)
        names = {"shape": "shape", "ground": "ground_text", "corner": "corner_text", "identity": "identity"}
        out |= {f"{short}{title}": scores[name].mean().item() for short, name in names.items()}
    return out


def evaluate(
    base: MiniBase, tools: Instruments, adapters: Path, name: str, setup: Setup
) -> tuple[dict[str, Any], dict[str, Sweep]]:
    """Numbers for JSON, and the sweeps by mode, of one trained run."""
    network = load_checkpoint(adapters).to(base.device)
    parts = adapters_of(name)
    sweeps = {mode: measure.gate_sweep(base, network, mode, tools, setup, parts) for mode in measure.MODES}
    out: dict[str, Any] = {mode: measure.summary(result) for mode, result in sweeps.items()}
    out["controls"] = controls(base, tools, network, setup, parts)
    out["base"] = evaluate_base(base, tools, setup)
    numbers = {"trained_numbers": trained_numbers(network, parts), "gate_mode": network.gate_mode}
    return {**out, "about": {**dataclasses.asdict(setup), **numbers}}, sweeps


def controls(
    base: MiniBase, tools: Instruments, network: FlexIPNetwork, setup: Setup, parts: tuple[str, ...]
) -> dict[str, float]:
    """At gate 1: identities when every case gets its neighbour's reference, and when it gets none."""
    tests = setup.tests()
    prompts, order = tests.prompts("conflict"), torch.arange(setup.cases).roll(1)
    own = tests.seen
    neighbour = world.Scene(own.shape[order], own.hues[order], own.ground[order], own.corner[order])
    with torch.no_grad():
        features = base.features(tests.reference)

    def identities(features: dict[str, torch.Tensor], *scenes: world.Scene) -> list[float]:
        pictures = draw(base, prompts, setup.noise(), network, features, 1.0, parts, steps=setup.steps, cfg=setup.cfg)
        verdict = tools.judge(pictures)
        return [judge.identity(verdict, scene).mean().item() for scene in scenes]

    theirs, mine = identities({key: value[order] for key, value in features.items()}, neighbour, own)
    (none,) = identities({key: torch.zeros_like(value) for key, value in features.items()}, own)
    return {"wrong_reference": theirs, "wrong_reference_to_own": mine, "zero_reference": none}


def trained_numbers(network: FlexIPNetwork, parts: tuple[str, ...]) -> int:
    return sum(p.numel() for key, p in network.named_parameters() if any(part in key.split(".") for part in parts))


def write_json(path: Path, data: dict[str, Any], command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"command": command, **data}, indent=1).encode())
