"""The immutable parts of a FlexIP chain, and what a run and its UNet calls look like to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..network.attention import Branch
from .reference import Reference, ReferenceSet, Shared
from .schedule import GateBatch, GateCurve

Gates = tuple[float, ...] | GateCurve | GateBatch
"""γ: one number, one per row of the batch, over the sampling, or over a batch of any size."""
View = tuple[tuple[int, ...], tuple[int, ...]]
"""The latent's rows and columns that a UNet call shows (the whole latent, an area, a tile, a context window)."""
Branches = dict[tuple[int, str], tuple[Branch, ...]]
"""(position in the chain, block address) -> what the block's patch adds."""


class Row(NamedTuple):
    entry: int  # which conditioning of the run: an index into LinkRun.conditionings
    item: int  # which row of the batch
    view: View | None = None  # which part of the latent the call shows; None: unknown, or not needed


class Call(NamedTuple):
    """What a UNet call looks like; the same layout gives the same branches."""

    rows: tuple[Row, ...]
    height: int
    width: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Link(Shared):
    """What one ApplyFlexIPGate adds to a model: immutable, shared by all clones of the model.

    `network` is a FlexIPNetwork (or whatever has its interface). `mask` and `gate_mask` (m, height, width) lie over the whole picture.
    """

    network: Any
    patcher: Any  # ComfyUI's ModelPatcher of the network
    reference: Reference | ReferenceSet
    gates: Gates
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    title: str = ""  # files, for the report
    files: tuple[str, ...] = ()  # their names by role
    node_id: str | None = None
    mask: torch.Tensor | None = None  # factor of the strength
    gate_mask: torch.Tensor | None = None  # factor of the gate
    depth: Mapping[str, Mapping[str, float]] | None = None  # adapter -> block address -> factor of the strength
    strengths: tuple[float, ...] = ()  # one per row of the batch, instead of `strength`
    over_prompts: bool = False  # the gates of a sweep: they count for prompts that bring their own, too

    @property
    def silent(self) -> bool:
        return not any(self.strengths or (self.strength,))


@dataclass(frozen=True, eq=False)
class Own(Shared):
    """What a conditioning brings along for one link of the chain, in place of that link's own."""

    reference: Reference | ReferenceSet | None
    gates: Gates
    strength: float


@dataclass(frozen=True, eq=False)
class Entry:
    """One conditioning of the run: its text (b, t, w), whether it gets the null reference, and what it brings along for links."""

    text: torch.Tensor
    null: bool
    own: Mapping[int, Own] = field(default_factory=dict)  # by position in the chain


@dataclass
class Counters:
    calls: int = 0
    active: int = 0
    untagged: int = 0
    projected: int = 0
    from_cache: int = 0
    tiles: int = 0  # calls that showed an unknown part of the picture to a link with a mask


@dataclass(frozen=True)
class Setting:
    """What a run needs to know of the model and the latent."""

    batch: int = 1
    copies: int = 1  # of a sweep: the batch holds the latents this many times
    height: int = 0  # of the latent
    width: int = 0
    levels: Mapping[str, int] = field(default_factory=dict)  # block address -> how often its image is halved
    percent_of: Callable[[float], float] = lambda sigma: 0.0

    @property
    def latents(self) -> int:
        """How many latents there are; whatever varies over the batch starts again with every copy."""
        return self.batch // self.copies

    def latent(self, item: int) -> int:
        """Which latent a row of the batch holds."""
        return item % self.latents
