"""Endless training pairs: every row shows a new subject, none of them held out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..training.data import ALL, VARIANT, Batch
from . import world

CUT_OUT = 0.2  # share of the invariant references that show the subject alone, on white


class WorldPairs:
    """Variant rows: the subject on another ground and in another corner. Invariant rows: the target itself, or its subject on white."""

    phrases = world.SLOTS

    def views(self) -> dict[str, int]:
        return {"every subject": 2}

    def pictures(self) -> int:
        return 1_000_000_000  # without end

    def batch(self, kinds: Tensor, generator: torch.Generator, rows: slice = ALL) -> Batch:
        scene = world.draw_subjects(len(kinds), generator)
        targets, inside = world.render(scene, generator)
        elsewhere, _ = world.render(world.move(scene, generator), generator)
        cut = torch.rand(len(kinds), generator=generator) < CUT_OUT
        same = torch.where(cut.view(-1, 1, 1, 1) & ~inside, 1.0, targets)
        references = torch.where((kinds == VARIANT).view(-1, 1, 1, 1), elsewhere, same)
        return Batch(*(value[rows] for value in (targets, references, world.captions(scene), kinds)))
