"""What each conditioning of a run means to one link: whose reference, which gate, and their K and V, projected before the first step."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..network.adapters import BlockKV
from .chain import Entry, Gates, Link, Own
from .reference import Reference, ReferenceSet, as_set, kv_bytes, row_strength


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One conditioning as one link sees it. `kv`: per reference, adapter -> block -> K, V (texts, tokens, width) on the CPU."""

    references: ReferenceSet  # its own or the link's
    gates: Gates  # its own or the link's
    strength: float  # its own, on top of the link's
    own: bool  # whether it brought a reference or gate along
    kv: tuple[dict[str, BlockKV], ...]

    @property
    def branches(self) -> int:
        """Softmaxes per adapter."""
        return len(self.kv) if self.references.combine == "one per region" else 1

    @property
    def bytes(self) -> int:
        return sum(kv_bytes(kv) for part in self.kv for kv in part.values())

    def strength_in(self, branch: int, latent: int) -> float:
        """Factor of the link's strength for one latent."""
        references = self.references
        return row_strength(references.combine, references.weights, latent, branch) * self.strength

    def token_counts(self, adapter: str) -> tuple[int, ...]:
        """Tokens of each reference."""
        return tuple(next(iter(part[adapter].values()))[0].shape[1] for part in self.kv)

    def tokens_in(self, adapter: str, branch: int, latent: int) -> int:
        """Tokens of one softmax for one latent, 1 where this conditioning has no such branch."""
        counts, references = self.token_counts(adapter), self.references
        if branch >= self.branches:
            return 1
        if references.combine == "concatenate":
            return sum(count for count, weight in zip(counts, references.weights) if weight > 0)
        return counts[latent % len(counts) if references.combine == "one per batch item" else branch]


@dataclass(frozen=True, eq=False)
class Projection:
    """K and V of one adapter for one reference (or its null features, or with one text)."""

    network: Any
    adapter: str
    reference: Reference
    null: bool
    text: torch.Tensor | None  # where the adapter reads it
    dtype: torch.dtype

    @functools.cached_property
    def key(self) -> tuple:
        return self.adapter, self.null, self.dtype, None if self.text is None else text_key(self.text)

    def kept(self) -> BlockKV | None:
        return self.reference.cache.get(self.network, self.key)

    def make(self, device: torch.device) -> BlockKV:
        """Computed on `device` in float32, kept with the reference on the CPU."""
        features = self.reference.null if self.null else self.reference.features
        features = {name: value.to(device, torch.float32) for name, value in features.items()}
        text = None if self.text is None else self.text.to(device, torch.float32)
        kv = self.network.project(self.adapter, self.network.tokens(self.adapter, features, text))
        kv = {address: (k.to("cpu", self.dtype), v.to("cpu", self.dtype)) for address, (k, v) in kv.items()}
        self.reference.cache.put(self.network, self.key, kv)
        return kv


@dataclass(frozen=True, eq=False)
class Plan:
    """A conditioning whose K and V are still to be found or made."""

    references: ReferenceSet
    gates: Gates
    strength: float
    own: bool
    projections: tuple[dict[str, Projection], ...]  # per reference, by adapter

    def __iter__(self) -> Iterator[Projection]:
        return (projection for part in self.projections for projection in part.values())

    def conditioning(self, kv_of: Callable[[Projection], BlockKV]) -> Conditioning:
        kv = tuple({name: kv_of(projection) for name, projection in part.items()} for part in self.projections)
        return Conditioning(self.references, self.gates, self.strength, self.own, kv)


def plan(link: Link, entry: Entry, own: Own | None, dtype: torch.dtype) -> Plan:
    """`own` is what the entry brings along for this link."""
    references = as_set(link.reference if own is None or own.reference is None else own.reference)
    gates, strength = (link.gates, 1.0) if own is None else (own.gates, own.strength)
    network = link.network
    projections = tuple(
        {
            name: Projection(network, name, source, null, entry.text if network.reads_text(name) else None, dtype)
            for name in network.adapters
        }
        for source, null in references.sources(entry.null)
    )
    return Plan(references, gates, strength, own is not None, projections)


def text_key(text: torch.Tensor) -> tuple:
    """Content, not identity: a re-encoded prompt is a new tensor with the same numbers."""
    data = text.detach().cpu().contiguous()
    return (
        tuple(data.shape),
        str(data.dtype),
        hashlib.blake2b(data.view(torch.uint8).numpy().data, digest_size=16).digest(),
    )
