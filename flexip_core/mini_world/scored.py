"""A sweep of the mini world as the file of scores that tables, figures and gate measures read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.checkpoint import load_checkpoint
from ..measuring.scores_file import Row, Scores
from . import measure, world
from .base import MiniBase
from .measure import Instruments, Setup, Sweep
from .runs import BASELINE, adapters_of

COLUMNS = {
    "CLIP-T": "clip_t",
    "CLIP-I": "clip_i",
    "DINO-I": "dino_i",
}
MODELS = {
    "CLIP-T": "mini world's CLIP stand-in, 64 px",
    "CLIP-I": "mini world's CLIP stand-in, 64 px",
    "DINO-I": "mini world's judge, 16 px",  # adapters never see its features, as they never see DINO v1's
}
MISSING = {
    name: f"{name} was trained on photographs; pictures of the mini world have 16 x 16 pixels."
    for name in ("CLIP-IQA", "Aesthetic")
}


def to_scores(sweep: Sweep, setup: Setup, mode: str, method: str, header: Mapping[str, Any] | None = None) -> Scores:
    """Every case is a subject of its own with one prompt and one noise. `header` adds to what `setup` says."""
    tests = setup.tests()
    prompts = [world.in_words(caption) for caption in tests.prompts(mode)]
    shapes = [world.WORDS["shape"][number] for number in tests.seen.shape.tolist()]
    values = {column: sweep.scores[name].tolist() for column, name in COLUMNS.items()}
    rows = tuple(
        Row(
            subject=f"{shape} {case:03d}",
            category=shape,
            case=prompt,
            image=0,
            gate=float(gate),
            scores={column: values[column][step][case] for column in COLUMNS},
        )
        for step, gate in enumerate(sweep.gates)
        for case, (shape, prompt) in enumerate(zip(shapes, prompts, strict=True))
    )
    about = {
        "benchmark": f"mini world, {mode}, {setup.cases} held-out subjects (test seed {setup.test_seed})",
        "knob": "gate",
        "gates": list(sweep.gates),
        "seeds": [setup.noise_seed],
        "sampler_name": "ddim",
        "steps": setup.steps,
        "cfg": setup.cfg,
    }
    return Scores(method, {**about, **(header or {})}, MODELS, MISSING, rows, sweep.features.flatten(0, 1))


def score_run(base: MiniBase, tools: Instruments, adapters: Path, name: str, setup: Setup, mode: str) -> Scores:
    """Sweeps the trained run `name`, whose weights are the file `adapters`; of the baseline it sweeps the adapter's scale."""
    network = load_checkpoint(adapters).to(base.device).float()  # those in the pack are half as precise
    sweep = measure.gate_sweep(base, network, mode, tools, setup, adapters_of(name))
    header = {
        "base": base.name,
        "checkpoint": hashlib.sha256(Path(adapters).read_bytes()).hexdigest(),
        "knob": "scale" if name == BASELINE else "gate",
    }
    return to_scores(sweep, setup, mode, name, header)
