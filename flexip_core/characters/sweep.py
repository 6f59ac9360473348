"""Sweeps the gate over held-out characters and lets the judge read every picture.

Shape legend: g gates, n cases (one character, one prompt, one noise each).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..measuring import smoothness
from ..network.adapters import ADAPTERS, FlexIPNetwork
from ..training import sampling
from . import base, judge
from .render import render
from .scenes import Scenes
from .scores import Instruments, Setup, Tests, tests_for
from .task import CharacterBase
from .words import IDENTITY


@dataclass(frozen=True, eq=False)
class Sweep:
    gates: tuple[float, ...]
    tests: Tests
    pictures: Tensor  # (g, n, 3, h, w)
    features: Tensor  # (g, n, f), the judge's
    scores: Mapping[str, Tensor]  # (g, n) each
    real: Mapping[str, Tensor] = field(default_factory=dict)  # (n,): rendered pictures of what is wanted, the ceiling

    def curve(self, name: str) -> Tensor:
        return self.scores[name].nanmean(1)


def gate_sweep(
    world: CharacterBase,
    network: FlexIPNetwork,
    mode: str,
    tools: Instruments,
    setup: Setup,
    adapters: tuple[str, ...] = ADAPTERS,
) -> Sweep:
    tests = tests_for(setup, mode, tools.drawings)
    noise = base.noise_for(setup.cases, setup.seed)
    with torch.no_grad():
        features = world.features(tests.reference)
    settings: dict[str, Any] = {"steps": setup.steps, "cfg": setup.cfg}
    rows = [
        sampling.draw(world, tests.captions, noise, network, features, gate, adapters, **settings)
        for gate in setup.gates
    ]
    scores = [tools.scores(row, tests) for row in rows]
    looks = torch.stack([tools.judge.embed(row) for row in rows])
    real = tools.scores(render(tools.drawings, tests.wanted), tests)
    joined = {name: torch.stack([row[name] for row in scores]) for name in real}
    return Sweep(setup.gates, tests, torch.stack(rows), looks, joined, real)


def summary(sweep: Sweep) -> dict[str, Any]:
    """For JSON: mean curves, the ceiling, and how evenly mean curves and single pictures move."""
    steps = smoothness.step_ratios(sweep.features)
    moving = ("parts", "likeness", "clip_i")
    return {
        "gates": list(sweep.gates),
        "cases": sweep.pictures.shape[1],
        "curves": {name: [round(value, 4) for value in sweep.curve(name).tolist()] for name in sweep.scores},
        "real": {name: round(values.nanmean().item(), 4) for name, values in sweep.real.items()},
        "jump share": {name: smoothness.jump_share(sweep.curve(name)) for name in moving},
        "single pictures": {"mean": steps.mean().item(), "median": steps.median().item()},
    }


def controls(
    world: CharacterBase,
    network: FlexIPNetwork,
    tools: Instruments,
    setup: Setup,
    adapters: tuple[str, ...] = ADAPTERS,
) -> dict[str, float]:
    """Parts at gate 1 when every case gets its neighbour's reference, and when it gets none."""
    tests = tests_for(setup, "named", tools.drawings)
    noise, order = base.noise_for(setup.cases, setup.seed), torch.arange(setup.cases).roll(1)
    with torch.no_grad():
        features = world.features(tests.reference)
    neighbour = tests.wanted.but(**{part.replace(" ", "_"): tests.wanted[part][order] for part in IDENTITY})

    def parts(features: Mapping[str, Tensor], *whose: Scenes) -> list[float]:
        drawn = sampling.draw(
            world, tests.captions, noise, network, dict(features), 1.0, adapters, steps=setup.steps, cfg=setup.cfg
        )
        verdict = judge.read(tools.judge, drawn)
        people = [some.to(drawn.device) for some in whose]
        return [
            judge.kept_parts(judge.agreement(verdict, some, judge.visible(tools.drawings, some))).nanmean().item()
            for some in people
        ]

    theirs, mine = parts({name: value[order] for name, value in features.items()}, neighbour, tests.wanted)
    (none,) = parts({name: torch.zeros_like(value) for name, value in features.items()}, tests.wanted)
    return {"wrong reference, its parts": theirs, "wrong reference, the right one's": mine, "no reference": none}
