"""What EncodeReference hands on: the features of the reference pictures, and of the null reference beside them."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch

from ..network.adapters import BlockKV
from ..network.attention import Branch
from ..network.config import FeatureNeed
from ..network.gate import stack_rows

COMBINE = ("concatenate", "average", "one per batch item", "one per region")


class Shared:
    """Its deep copy is itself: some packs make deep copies of models, conditionings and the options of a run, and must copy
    neither weights nor kept projections."""

    def __deepcopy__(self, memo: dict) -> Any:
        return self


class ProjectionCache:
    """K and V that outlive a run, on the CPU, so that another gate, strength or seed projects nothing again.

    Belongs to one reference and is freed with it, or with the network that made an entry. The caches of all references
    share one budget: when they exceed `limit` bytes together, the least recently used goes, whichever reference it belongs to.
    """

    limit = 512 * 2**20
    _all: ClassVar[WeakSet[ProjectionCache]] = WeakSet()
    _clock: ClassVar[Iterator[int]] = itertools.count()
    _lock: ClassVar[threading.Lock] = threading.Lock()  # runs may happen on several threads

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[Any, dict[Hashable, Projected]] = WeakKeyDictionary()
        with self._lock:
            self._all.add(self)

    def get(self, network: Any, key: Hashable) -> BlockKV | None:
        with self._lock:
            kept = self._entries.get(network, {}).get(key)
            if kept is None:
                return None
            kept.used = next(self._clock)
            return kept.value

    def put(self, network: Any, key: Hashable, value: BlockKV) -> None:
        with self._lock:
            self._entries.setdefault(network, {})[key] = Projected(value, kv_bytes(value), next(self._clock))
            self._make_room()

    @classmethod
    def _make_room(cls) -> None:
        shelves = [entries for cache in cls._all for entries in cache._entries.values()]
        total = sum(kept.size for entries in shelves for kept in entries.values())
        if total <= cls.limit:
            return
        by_age = sorted(
            (kept.used, number, key) for number, entries in enumerate(shelves) for key, kept in entries.items()
        )
        for _, number, key in by_age[:-1]:  # the newest stays, however large it is
            total -= shelves[number].pop(key).size
            if total <= cls.limit:
                return


@dataclass
class Projected:
    value: BlockKV
    size: int  # bytes
    used: int  # when it was last used


def kv_bytes(kv: BlockKV) -> int:
    return sum(t.numel() * t.element_size() for pair in kv.values() for t in pair)


@dataclass(frozen=True, eq=False)
class Reference(Shared):
    """Features by the name the adapters ask for ("cls" (r, width), "patches" (r, p, width)), r pictures of one subject.

    `null` has the same names and shapes: what stands for "no reference" in the unconditional branch. Features stay on the CPU.
    """

    features: dict[str, torch.Tensor]
    null: dict[str, torch.Tensor]
    encoders: str  # in words, for the report
    needs: tuple[FeatureNeed, ...] = ()  # what it was encoded for
    adapters: Any = None  # those very ones, for whoever applies it; None for one out of a file
    cache: ProjectionCache = field(default_factory=ProjectionCache, repr=False)

    @property
    def count(self) -> int:
        return next(iter(self.features.values())).shape[0]

    @property
    def pictures(self) -> tuple[Reference, ...]:
        """One reference per picture, always the same ones: their projections are kept with them."""
        return (self,) if self.count == 1 else self._apart

    @functools.cached_property
    def _apart(self) -> tuple[Reference, ...]:
        return tuple(
            Reference(
                {name: value[i : i + 1] for name, value in self.features.items()},
                {name: value[i : i + 1] for name, value in self.null.items()},
                self.encoders,
                self.needs,
                self.adapters,
            )
            for i in range(self.count)
        )


@dataclass(frozen=True, eq=False)
class ReferenceSet(Shared):
    """Several references with a weight each, and how they become one.

    concatenate: all tokens in one softmax, a weight counts like that many copies of its reference (0: left out).
    average: the weighted mean of the tokens. one per batch item: latent i of the batch gets reference i (they repeat), its
    strength times the weight. one per region: each acts where its mask (`masks` (n, h, w)) is, its strength times the weight.
    `negative` stands in for the null reference in the unconditional branch.
    """

    references: tuple[Reference, ...]
    weights: tuple[float, ...]
    combine: str = "concatenate"
    masks: torch.Tensor | None = None
    negative: Reference | None = None

    @property
    def needs(self) -> tuple[FeatureNeed, ...]:
        return self.references[0].needs

    @property
    def adapters(self) -> Any:
        return next((one.adapters for one in self.references if one.adapters is not None), None)

    @property
    def encoders(self) -> str:
        return "; ".join(dict.fromkeys(reference.encoders for reference in self.references))

    def describe(self) -> str:
        pictures = sum(reference.count for reference in self.references)
        text = f"{pictures} picture(s)"
        if len(self.references) > 1:
            weights = ", ".join(f"{weight:g}" for weight in self.weights)
            text += f" in {len(self.references)} references, {self.combine}, weights {weights}"
        return text + (", with a negative reference" if self.negative is not None else "")

    def sources(self, null: bool) -> tuple[tuple[Reference, bool], ...]:
        """Per reference what stands for it: (reference, whether its null features are meant)."""
        if null and self.negative is not None:
            return ((self.negative, False),) * len(self.references)
        return tuple((reference, null) for reference in self.references)


def as_set(reference: Reference | ReferenceSet) -> ReferenceSet:
    return reference if isinstance(reference, ReferenceSet) else ReferenceSet((reference,), (1.0,))


def combined(
    mode: str,
    weights: Sequence[float],
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    items: Sequence[int],
    latents: Sequence[int],
) -> tuple[Branch, ...]:
    """K, V (texts, n, c) of each reference -> those of the rows `items` of the batch, (len(items), n, c).

    `latents` are the same rows counted within one copy of a sweep. One branch, for "one per region" one per reference. Weights that are strengths are not folded in: see `row_strength`.
    """
    if mode == "one per region":
        return tuple(Branch(*_rows_of(part, items)) for part in parts)
    if mode == "one per batch item":
        rows = [_rows_of(parts[latent % len(parts)], [item]) for item, latent in zip(items, latents)]
        return (stack_rows([Branch(*row) for row in rows]),)
    kept = [(weight, part) for weight, part in zip(weights, parts) if weight > 0]
    rows = [_rows_of(part, items) for _, part in kept]
    if mode == "average":
        shares = [weight / sum(weight for weight, _ in kept) for weight, _ in kept]
        return (Branch(*(sum(t.float() * share for t, share in zip(ts, shares)).to(ts[0].dtype) for ts in zip(*rows))),)
    k, v = (torch.cat(ts, dim=1) for ts in zip(*rows))
    if all(weight == kept[0][0] for weight, _ in kept):
        return (Branch(k, v),)
    # softmax over scores + log w: a token with weight w takes the share of w tokens with weight 1
    bias = [torch.full((part[0].shape[1],), math.log(weight)) for weight, part in kept]
    return (Branch(k, v, torch.cat(bias).to(k).view(1, 1, 1, -1).expand(len(items), -1, -1, -1)),)


def row_strength(mode: str, weights: Sequence[float], latent: int, number: int) -> float:
    """Factor of the strength of a row in branch `number` of `combined`."""
    if mode == "one per region":
        return weights[number]
    return weights[latent % len(weights)] if mode == "one per batch item" else 1.0


def _rows_of(pair: tuple[torch.Tensor, torch.Tensor], items: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """K, V (texts, n, c) of one conditioning for these rows of the latent batch."""
    k, v = pair
    if k.shape[0] == 1:
        return k.expand(len(items), -1, -1), v.expand(len(items), -1, -1)
    index = torch.tensor([item % k.shape[0] for item in items], device=k.device)  # as core repeats a short text batch
    return k[index], v[index]
