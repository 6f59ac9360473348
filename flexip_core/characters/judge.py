"""Reads every part and all staging off a picture. Trained apart from what it judges, and no adapter ever sees it.

Shape legend: n pictures.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import scenes
from .drawings import COLOURS, Drawings
from .render import SIZE, render
from .run import Plan
from .scenes import Scenes
from .words import IDENTITY, STAGING, STYLES, WORDS

READ = (*STAGING, *IDENTITY)
PLAN = Plan("judge", steps=5000, batch=64, rate=2e-3, seed=23, falling=0.6, weight_decay=0.02)
WIDTHS = (32, 64, 128, 192)
FEATURES = 384
SMALLEST_HAIR = 80  # pixels of a layer below which nobody sees its colour
NOISE = 0.12  # of the pictures that it learns from, at most: what it will judge is sampled


class Judge(nn.Module):
    """Pictures (n, 3, SIZE, SIZE) in -1..1 -> slot -> scores (n, words of the slot)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inp = 3
        for width in WIDTHS:
            layers += [_halved(inp, width), _Residual(width)]
            inp = width
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Linear(WIDTHS[-1] * (SIZE >> len(WIDTHS)) ** 2, FEATURES)
        self.heads = nn.Linear(FEATURES, sum(len(WORDS[slot]) for slot in READ))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        scores = self.heads(F.gelu(self.features(self.trunk(pictures))))
        return dict(zip(READ, scores.split([len(WORDS[slot]) for slot in READ], dim=-1)))

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """How pictures look, (n, FEATURES) of unit length: what DINO is for photographs."""
        return F.normalize(self.features(self.trunk(pictures)), dim=-1)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.body(x))


def _halved(inp: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, out, 3, 2, 1), nn.GroupNorm(8, out), nn.GELU())


def visible(drawings: Drawings, shown: Scenes) -> dict[str, Tensor]:
    """Slot -> (n,) bool: whether a picture of the scene tells it at all. Ink has no colours, bald heads no colour of hair."""
    hair_plane = 4 + COLOURS.index("headContrast")
    head, beard = (drawings.layers[group][:, hair_plane].float().sum((1, 2)) / 255 for group in ("head", "facialHair"))
    coloured = shown["style"] != STYLES.index("ink")
    everything = torch.ones_like(coloured)
    area = torch.maximum(head[shown["hair"]], beard[shown["beard"]])
    hidden = {"skin": coloured, "clothes": coloured, "hair colour": coloured & (area > SMALLEST_HAIR)}
    return {slot: hidden.get(slot, everything) for slot in READ}


class JudgeLoss:
    """Cross-entropy of every slot over the pictures that tell it."""

    def __init__(self, drawings: Drawings, batch: int):
        self.drawings, self.batch = drawings, batch

    def __call__(self, judge: Judge, g: torch.Generator) -> Tensor:
        shown = scenes.stage(scenes.characters(self.batch, g, "judge"), g).to(self.drawings.device)
        pictures = render(self.drawings, shown)
        strength = NOISE * torch.rand(self.batch, 1, 1, 1, generator=g).to(pictures.device)
        pictures = pictures + strength * torch.randn(pictures.shape, generator=g).to(pictures.device)
        with torch.autocast(pictures.device.type, torch.bfloat16):
            verdict = judge(pictures)
        tells = visible(self.drawings, shown)
        losses = []
        for slot in READ:
            rows = F.cross_entropy(verdict[slot].float(), shown[slot], reduction="none")
            losses.append((rows * tells[slot]).sum() / tells[slot].sum().clamp(min=1))
        return torch.stack(losses).mean()


def agreement(verdict: Mapping[str, Tensor], wanted: Scenes, tells: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slot -> (n,): 1 where the judge reads what the scene says, 0 where not, nan where no picture could tell."""
    return {slot: (verdict[slot].argmax(-1) == wanted[slot]).float().where(tells[slot], torch.nan) for slot in READ}


def kept_parts(agreed: Mapping[str, Tensor]) -> Tensor:
    """(n,) share of the visible parts of identity that agree"""
    return torch.stack([agreed[part] for part in IDENTITY]).nanmean(0)


def shares(agreed: Mapping[str, Tensor]) -> dict[str, float]:
    """Slot -> share of the pictures that can tell it; besides "parts" (mean share kept) and "all parts" (pictures with all)."""
    parts = kept_parts(agreed)
    out = {slot: values.nanmean().item() for slot, values in agreed.items()}
    return {**out, "parts": parts.mean().item(), "all parts": (parts == 1).float().mean().item()}


@torch.no_grad()
def on_real_pictures(judge: Judge, drawings: Drawings, n: int, seed: int, split: str = "test") -> dict[str, Tensor]:
    """`agreement` on n rendered pictures of a split: what the judge reads of perfect ones."""
    g = torch.Generator().manual_seed(seed)
    shown = scenes.stage(scenes.characters(n, g, split), g).to(drawings.device)
    return agreement(read(judge, render(drawings, shown)), shown, visible(drawings, shown))


@torch.no_grad()
def read(judge: Judge, pictures: Tensor, batch: int = 128) -> dict[str, Tensor]:
    """The judge's scores of any number of pictures."""
    verdicts = [judge(some) for some in pictures.split(batch)]
    return {slot: torch.cat([verdict[slot] for verdict in verdicts]) for slot in READ}
