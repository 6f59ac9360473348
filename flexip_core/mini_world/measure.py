"""Sweeps the gate over held-out subjects and scores every picture.

Shape legend: g gates, n cases (one subject, one prompt, one noise each).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measuring import smoothness
from ..network.adapters import ADAPTERS, FlexIPNetwork
from . import judge as judging
from . import world
from .base import MiniBase
from .encoders import Contrast, pixels_for
from .judge import Judge
from .sampling import CFG, STEPS, Dial, draw, everywhere, noise_for
from .world import TestSet

GATES = tuple(i / 10 for i in range(11))
MODES = ("conflict", "omit")
SCORES = {
    "identity": "mean cosine of the two hues with the reference's (1 the same, 0 unrelated)",
    "shape": "shape is the one in the text",
    "ground_text": "ground is the target's (named in conflict mode)",
    "corner_text": "corner is the target's (named in conflict mode)",
    "ground_copied": "ground is the reference's",
    "corner_copied": "corner is the reference's",
    "clip_i": "cosine with the reference, CLIP stand-in",
    "clip_t": "cosine with the prompt, CLIP stand-in",
    "dino_i": "cosine with the reference, the judge's features (an encoder that the adapters never see)",
    "patch_i": "cosine with the reference, all patch tokens of the DINO stand-in",
}


@dataclass(frozen=True)
class Setup:
    """What an evaluation shows and how it samples. The same noise and the same cases at every gate."""

    cases: int = 64
    test_seed: int = 777
    noise_seed: int = 0
    gates: tuple[float, ...] = GATES
    steps: int = STEPS
    cfg: float = CFG

    def tests(self) -> TestSet:
        return world.test_set(self.cases, self.test_seed)

    def noise(self) -> Tensor:
        return noise_for(self.cases, self.noise_seed)


@dataclass(frozen=True, eq=False)
class Instruments:
    judge: Judge
    clip: Contrast
    dino: Any  # DinoTower

    def patches(self, pictures: Tensor) -> Tensor:
        return self.dino(pixels_for(self.dino, pictures)).flatten(1)

    @torch.no_grad()
    def scores(self, pictures: Tensor, tests: TestSet, prompts: Tensor) -> dict[str, Tensor]:
        """Every score of n pictures, (n,) each."""
        seen, wanted, references = tests.seen, tests.wanted, tests.reference
        verdict = self.judge(pictures)
        return {
            "identity": judging.identity(verdict, seen),
            "shape": judging.is_right(verdict.shape, wanted.shape),
            "ground_text": judging.is_right(verdict.ground, wanted.ground),
            "corner_text": judging.is_right(verdict.corner, wanted.corner),
            "ground_copied": judging.is_right(verdict.ground, seen.ground),
            "corner_copied": judging.is_right(verdict.corner, seen.corner),
            "clip_i": (self.clip.of_pictures(pictures) * self.clip.of_pictures(references)).sum(-1),
            "clip_t": (self.clip.of_pictures(pictures) * self.clip.of_captions(prompts)).sum(-1),
            "dino_i": (verdict.features * self.judge(references).features).sum(-1),
            "patch_i": F.cosine_similarity(self.patches(pictures), self.patches(references)),
        }


@dataclass(frozen=True, eq=False)
class Sweep:
    gates: tuple[float, ...]
    pictures: Tensor  # (g, n, 3, 16, 16) in -1..1
    features: Tensor  # (g, n, 128), the judge's
    scores: dict[str, Tensor]  # (g, n) each

    def curve(self, name: str) -> Tensor:
        return self.scores[name].mean(1)

    def at(self, name: str, gate: float) -> float:
        return self.curve(name)[self.gates.index(gate)].item()


def gate_sweep(
    base: MiniBase,
    network: FlexIPNetwork,
    mode: str,
    tools: Instruments,
    setup: Setup,
    adapters: Iterable[str] = ADAPTERS,
    dial: Dial = everywhere,
) -> Sweep:
    tests, noise = setup.tests(), setup.noise()
    prompts = tests.prompts(mode)
    with torch.no_grad():
        features = base.features(tests.reference)
        rows = [
            draw(
                base,
                prompts,
                noise,
                network,
                features,
                gate,
                tuple(adapters),
                steps=setup.steps,
                cfg=setup.cfg,
                dial=dial,
            )
            for gate in setup.gates
        ]
        seen = torch.stack([tools.judge(row).features for row in rows])
        scores = [tools.scores(row, tests, prompts) for row in rows]
    return Sweep(
        setup.gates, torch.stack(rows), seen, {name: torch.stack([row[name] for row in scores]) for name in SCORES}
    )


def summary(result: Sweep) -> dict[str, Any]:
    """For JSON: mean curves, and how evenly curves and single cases move."""
    moving = ("identity", "clip_i", "dino_i", "patch_i", "clip_t", "corner_copied", "corner_text", "ground_text")
    ratios = smoothness.step_ratios(result.features)
    pixels = smoothness.step_ratios(result.pictures.flatten(2))
    out: dict[str, Any] = {
        "gates": list(result.gates),
        "cases": result.pictures.shape[1],
        "curves": {name: _rounded(result.curve(name)) for name in SCORES},
        "per_image_feature_step": {
            "mean": ratios.mean().item(),
            "median": ratios.median().item(),
            "p99": ratios.quantile(0.99).item(),
            "largest_at": smoothness.largest_step_at(result.features)
            .bincount(minlength=len(result.gates) - 1)
            .tolist(),
        },
        "per_image_pixel_step": pixels.mean().item(),
        "smoothness": {},
    }
    for name in moving:
        curve, cases = result.curve(name), result.scores[name]
        share, count = smoothness.case_jump_share(cases)
        out["smoothness"][name] = {
            "range": (curve[-1] - curve[0]).item(),
            "spearman": smoothness.spearman(curve).item(),
            "spearman_of_cases": smoothness.spearman(cases).mean().item(),
            "jump_share": smoothness.jump_share(curve),
            "case_jump_share": share,
            "cases_that_move": count,
            "straightness": smoothness.straightness(curve),
        }
    return out


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
