"""The named training runs of adapters; scripts/characters.py starts them.

A name is a gate mode ("outputs", "tokens"), with "-jitter" if the gate of each row is drawn from its half instead of being one
of two numbers, "-overlap" if the two ranges overlap, and "-swapped" if the two kinds of data exchange their gates (a control).
"ip" is the baseline: an IP-Adapter, that is the preservation adapter alone at weight 1, on the same pairs and of the same size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..network.config import GATE_MODES
from ..training.config import TrainConfig
from ..training.loop import FINAL
from .words import IDENTITY, STAGING

BASELINE = "ip"
GATES = {  # option -> the gates of the two kinds of data
    "": {"invariant": 0.8, "variant": 0.2},
    "jitter": {"invariant": [0.5, 1.0], "variant": [0.0, 0.5]},
    "overlap": {"invariant": [0.3, 1.0], "variant": [0.0, 0.7]},
}
SWAPPED = "swapped"
NETWORK = {
    "resampler": {"width": 160, "depth": 2, "heads": 4, "dim_head": 40, "ff_mult": 3},
    "detail_tokens": 32,
    "semantic_tokens": 4,
    "cls_tokens": 4,
}
IP_NETWORK = {**NETWORK, "resampler": {"width": 208, "depth": 2, "heads": 4, "dim_head": 52, "ff_mult": 3}}
# no identity word is ever said, and half of the others are missing: what the text leaves open, the gate decides
DROPPED = {**dict.fromkeys(IDENTITY, 1.0), **dict.fromkeys(STAGING, 0.5), "subject": 0.1}
TRAINING = {
    "batch": 64,
    "start": "text",
    "mix": 0.5,
    "precision": "bf16",
    "log_every": 50,
    "probe_every": 1_000_000,
    "checkpoint_every": 50,
    "keep": 1,
    "dropout": {"image": 0.05, "text": 0.05, "both": 0.05, "phrases": DROPPED},
    "optimizer": {"lr": 1.5e-3, "warmup": 100, "cosine_from": 0.0},
    "ema": {"decay": 0.998, "power": 0.75},
}
STEPS, SCREENING_STEPS = 2500, 600


def config(name: str, seed: int, home: Path, steps: int = STEPS) -> TrainConfig:
    """The run `name` in `home`/runs, on the base and encoders in `home`. ValueError if there is no such run."""
    mode, *options = name.split("-")
    ranges = [option for option in options if option != SWAPPED]
    if mode == BASELINE and not options:
        ones = {"invariant": 1.0, "variant": 1.0}
        extra: dict[str, Any] = {"gates": ones, "network": IP_NETWORK, "train_adapters": ["preservation"]}
    elif mode in GATE_MODES and len(ranges) <= 1 and set(ranges) <= set(GATES):
        gates = GATES["".join(ranges)]
        if SWAPPED in options:
            gates = {"invariant": gates["variant"], "variant": gates["invariant"]}
        extra = {"gates": gates, "network": {**NETWORK, "gate_mode": mode}}
    else:
        raise ValueError(
            f"There is no run {name!r}; choose outputs or tokens, with -jitter or -overlap and with -swapped behind it if "
            "wanted, or ip."
        )
    return TrainConfig.from_dict(
        {
            **TRAINING,
            **extra,
            "steps": steps,
            "seed": seed,
            "folder": str(run_folder(home, name, seed, steps)),
            "task": {"make": "flexip_core.characters.task:make", "home": str(home)},
        }
    )


def run_folder(home: Path, name: str, seed: int, steps: int = STEPS) -> Path:
    return home / "runs" / f"{name}_{seed}_{steps}"


def adapters_file(home: Path, name: str, seed: int, steps: int = STEPS) -> Path:
    """ValueError if that run is not finished."""
    path = run_folder(home, name, seed, steps) / FINAL
    if not path.exists():
        raise ValueError(f"{path.parent} holds no finished run; train it first.")
    return path
