"""What EncodeReference hands on: the features of the reference pictures, and of the null reference beside them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .adapters import BlockKV
from .config import FeatureNeed


class ProjectionCache:
    """K and V that outlive a run, on the CPU, so that another gate, strength or seed projects nothing again.

    Belongs to one reference and is freed with it, or with the network that made an entry. The least recently used entries go
    when all entries of a network exceed `limit` bytes: what does not depend on the prompt is read in every run and stays.
    """

    def __init__(self, limit: int = 512 * 2**20):
        self.limit = limit
        self._entries: WeakKeyDictionary[Any, OrderedDict[Hashable, BlockKV]] = WeakKeyDictionary()

    def get(self, network: Any, key: Hashable) -> BlockKV | None:
        entries = self._entries.get(network)
        if entries is None or key not in entries:
            return None
        entries.move_to_end(key)
        return entries[key]

    def put(self, network: Any, key: Hashable, value: BlockKV) -> None:
        entries = self._entries.setdefault(network, OrderedDict())
        entries[key] = value
        while len(entries) > 1 and sum(map(kv_bytes, entries.values())) > self.limit:
            entries.popitem(last=False)


def kv_bytes(kv: BlockKV) -> int:
    return sum(t.numel() * t.element_size() for pair in kv.values() for t in pair)


@dataclass(frozen=True, eq=False)
class Reference:
    """Features by the name the adapters ask for ("cls" (r, width), "patches" (r, p, width)), r pictures of one subject.

    `null` has the same names and shapes: what stands for "no reference" in the unconditional branch. Features rest on the CPU.
    """

    features: dict[str, torch.Tensor]
    null: dict[str, torch.Tensor]
    encoders: str  # in words, for the report
    needs: tuple[FeatureNeed, ...] = ()  # what it was encoded for
    cache: ProjectionCache = field(default_factory=ProjectionCache, repr=False)

    @property
    def count(self) -> int:
        return next(iter(self.features.values())).shape[0]
