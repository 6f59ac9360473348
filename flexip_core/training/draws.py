"""What a step draws. Everything random is a function of (seed, step, purpose), so a run can be resumed and shared by ranks exactly."""

from __future__ import annotations

import hashlib

import torch

from ..network.gate import Numbers
from .config import DropoutConfig, GateConfig
from .data import INVARIANT, VARIANT


def generator(seed: int, step: int, rank: int, purpose: str) -> torch.Generator:
    """Each purpose has draws of its own, so that a source that draws more changes neither noise nor gates."""
    digest = hashlib.blake2b(f"{seed} {step} {rank} {purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_kinds(batch: int, mix: float, g: torch.Generator) -> torch.Tensor:
    return torch.where(torch.rand(batch, generator=g) < mix, VARIANT, INVARIANT)


def draw_gates(kinds: torch.Tensor, cfg: GateConfig, g: torch.Generator) -> Numbers:
    """γ of each row, evenly from the range of its kind."""
    low, high = torch.tensor([cfg.invariant, cfg.variant], dtype=torch.float64)[kinds].T
    return tuple((low + (high - low) * torch.rand(len(kinds), generator=g, dtype=torch.float64)).tolist())


def draw_dropout(batch: int, cfg: DropoutConfig, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(b,) rows without reference, (b,) rows without text: one draw, so that the three shares exclude each other."""
    draw = torch.rand(batch, generator=g)
    image = draw < cfg.image
    text = ~image & (draw < cfg.image + cfg.text)
    both = ~image & ~text & (draw < cfg.image + cfg.text + cfg.both)
    return image | both, text | both
