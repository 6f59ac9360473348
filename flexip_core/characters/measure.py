"""Does the base draw what it is told? The judge's answer, and its ceiling on real pictures beside it.

Shape legend: n pictures.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import base, judge, scenes
from .codec import Codec
from .drawings import Drawings
from .judge import Judge
from .render import render
from .words import prompts

PICTURES, SEED = 256, 99
M1 = {"parts": 0.6, "ground": 0.95, "clothes": 0.95}  # after 60 minutes of one core
M2 = {"parts": 0.8, "expression": 0.7}  # after 150


@torch.no_grad()
def of_base(
    model: base.Generator, codec: Codec, drawings: Drawings, critic: Judge, n: int = PICTURES, seed: int = SEED
) -> dict[str, Any]:
    """Shares of held-out characters' slots that the judge finds in what the base draws from their captions.

    "told": with identity words. "untold": without, so that parts are at chance and staging is what a prompt gets.
    "real": the judge on rendered pictures of the same scenes, its ceiling.
    """
    g = torch.Generator().manual_seed(seed)
    shown = scenes.stage(scenes.characters(n, g, "test"), g)
    captions, noise = scenes.captions(shown), base.noise_for(n, seed)
    pictures = {
        "told": _drawn(model, codec, captions, noise),
        "untold": _drawn(model, codec, prompts(captions), noise),
        "real": render(drawings, shown),
    }
    shown = shown.to(drawings.device)
    tells = judge.visible(drawings, shown)
    found = {
        title: judge.shares(judge.agreement(judge.read(critic, some), shown, tells)) for title, some in pictures.items()
    }
    return {**found, "pictures": n, "seed": seed, "M1": passes(found["told"], M1), "M2": passes(found["told"], M2)}


def _drawn(model: base.Generator, codec: Codec, captions: Tensor, noise: Tensor, batch: int = 64) -> Tensor:
    pairs = zip(captions.split(batch), noise.split(batch))
    return torch.cat([base.draw(model, codec, some, start) for some, start in pairs])


def passes(found: dict[str, float], lines: dict[str, float]) -> bool:
    return all(found[slot] >= line for slot, line in lines.items())


def margin(share: float, n: int) -> float:
    """Half of the 95 % interval of a share of n."""
    return 1.96 * math.sqrt(max(share * (1 - share), 1 / n) / n)


def table(found: dict[str, Any]) -> str:
    """Markdown: one row per slot."""
    titles = ("told", "untold", "real")
    rows = [["slot", *titles], ["---"] * (1 + len(titles))]
    rows += [[slot, *(f"{found[title][slot]:.3f}" for title in titles)] for slot in found["real"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
