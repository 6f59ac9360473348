"""Reads shape, ground, corner and hues off a picture; trained separately from everything that it judges."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import world
from .optimizer import warm_cosine
from .world import Scene

FEATURES = 128
_HEADS = (len(world.WORDS["shape"]), len(world.WORDS["ground"]), len(world.WORDS["corner"]), 4)


class Verdict(NamedTuple):
    features: Tensor  # (b, 128), unit length; an encoder that adapters never see, as DINO v1 is for DINO-I
    shape: Tensor  # (b, 4) scores
    ground: Tensor  # (b, 6)
    corner: Tensor  # (b, 4)
    hues: Tensor  # (b, 4): cosine and sine of the upper hue, then of the lower one


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def halved(inp: int, out: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inp, out, 3, 2, 1), nn.GroupNorm(8, out), nn.GELU())

        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), halved(32, 32), halved(32, 128), halved(128, 128), nn.Flatten()
        )
        self.features = nn.Linear(128 * 4, FEATURES)
        self.heads = nn.Linear(FEATURES, sum(_HEADS))

    def forward(self, pictures: Tensor) -> Verdict:
        """(b, 3, 16, 16) in -1..1"""
        features = self.features(self.trunk(pictures))
        return Verdict(F.normalize(features, dim=-1), *self.heads(F.gelu(features)).split(_HEADS, dim=-1))


def train(seed: int, steps: int = 1000, batch: int = 64) -> Judge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    g = torch.Generator().manual_seed(seed)
    optimizer, schedule = warm_cosine(judge.parameters(), 2e-3, steps)
    for _ in range(steps):
        scene = world.draw_subjects(batch, g)
        pictures, _ = world.render(scene, g)
        # what it will judge is sampled, not rendered: a little blur of the edge and noise everywhere
        verdict = judge(
            pictures + 0.15 * torch.rand(batch, 1, 1, 1, generator=g) * torch.randn(pictures.shape, generator=g)
        )
        loss = (
            F.cross_entropy(verdict.shape, scene.shape)
            + F.cross_entropy(verdict.ground, scene.ground)
            + F.cross_entropy(verdict.corner, scene.corner)
            + 3 * F.mse_loss(verdict.hues, world.angles(scene.hues))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def identity(verdict: Verdict, scene: Scene) -> Tensor:
    """(b,) mean cosine between the hues seen and those of `scene`: 1 the same, 0 unrelated."""
    seen = verdict.hues.unflatten(1, (2, 2))
    return F.cosine_similarity(seen, world.angles(scene.hues).unflatten(1, (2, 2)), dim=-1).mean(1)


def is_right(scores: Tensor, wanted: Tensor) -> Tensor:
    """(b,) of 0 and 1"""
    return (scores.argmax(-1) == wanted).float()


@torch.no_grad()
def held_out_accuracy(judge: Judge, n: int, seed: int) -> dict[str, float]:
    g = torch.Generator().manual_seed(seed)
    scene = world.draw_subjects(n, g, held_out=True)
    verdict = judge(world.render(scene, g)[0])
    rows = {name: is_right(getattr(verdict, name), getattr(scene, name)) for name in ("shape", "ground", "corner")}
    return {name: row.mean().item() for name, row in {**rows, "hues": identity(verdict, scene)}.items()}
