"""Held-out cases, and every score of a picture drawn for them.

Shape legend: n cases (one character, one prompt, one noise each).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import judge, scenes
from .drawings import Drawings
from .encoders import Contrast
from .judge import Judge
from .render import render
from .scenes import Scenes
from .words import IDENTITY, STAGING, STYLES, WORDS, prompts, without

GATES = tuple(number / 10 for number in range(11))
STEPS, CFG = 20, 2.0
MODES = {
    "named": "another expression, clothes, ground, pattern and place than the reference's, in the artist's own style",
    "styled": "the same in another style",
    "open": "a person",
}


@dataclass(frozen=True)
class Setup:
    """What an evaluation shows and how it samples. The same noise and the same cases at every gate."""

    cases: int = 64
    seed: int = 777
    split: str = "test"
    gates: tuple[float, ...] = GATES
    steps: int = STEPS
    cfg: float = CFG


@dataclass(frozen=True, eq=False)
class Tests:
    """References in the artist's own style, and what a perfect model makes of them."""

    __test__ = False  # not for pytest

    reference: Tensor  # (n, 3, h, w)
    seen: Scenes  # what the references show
    wanted: Scenes  # what the prompts ask for
    captions: Tensor  # (n, slots)


def tests_for(setup: Setup, mode: str, drawings: Drawings) -> Tests:
    g = torch.Generator().manual_seed(setup.seed)
    people = scenes.characters(setup.cases, g, setup.split)
    seen = scenes.stage(people, g, own_style=1.0)
    wanted = scenes.stage(people, g)
    other = {slot: (seen[slot] + 1 + wanted[slot] % (len(WORDS[slot]) - 1)) % len(WORDS[slot]) for slot in STAGING}
    if mode != "styled":
        other["style"] = torch.full_like(other["style"], STYLES.index("comic"))
    wanted = wanted.but(**other)
    captions = prompts(scenes.captions(wanted))
    if mode == "open":
        captions = without(captions, *STAGING)
    return Tests(render(drawings, seen), seen, wanted, captions)


tests_for.__test__ = False


@dataclass(frozen=True, eq=False)
class Instruments:
    drawings: Drawings
    judge: Judge
    clip: Contrast

    @torch.no_grad()
    def scores(self, pictures: Tensor, tests: Tests) -> dict[str, Tensor]:
        """Every score of n pictures, (n,) each; nan where the picture cannot tell."""
        seen, wanted = (some.to(pictures.device) for some in (tests.seen, tests.wanted))
        verdict = judge.read(self.judge, pictures)
        asked = judge.agreement(verdict, wanted, judge.visible(self.drawings, wanted))
        copied = judge.agreement(verdict, seen, judge.visible(self.drawings, seen))
        parts = judge.kept_parts(asked)
        look = self.judge.embed(pictures)
        clip_i = self.clip.of_pictures(pictures) * self.clip.of_pictures(tests.reference)
        clip_t = self.clip.of_pictures(pictures) * self.clip.of_captions(tests.captions.to(pictures.device))
        return {
            "parts": parts,
            "all parts": (parts == 1).float(),
            **{part: asked[part] for part in IDENTITY},
            **{f"{slot} of the text": asked[slot] for slot in STAGING},
            **{f"{slot} of the reference": copied[slot] for slot in STAGING},
            "likeness": (look * self.judge.embed(tests.reference)).sum(-1),  # cosine, the judge's features
            "clip_i": clip_i.sum(-1),
            "clip_t": clip_t.sum(-1),
        }
