"""Kept K and V: all references share one budget, what was used longest ago goes first, and nothing outlives its owners."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakSet

import pytest
import torch

from flexip_core.run.reference import ProjectionCache, Reference

KB = 1024


class Network:
    pass


NETWORK = Network()


def kv(kilobytes: int = 1) -> dict:
    return {"middle.0.0": (torch.zeros(kilobytes * KB // 8), torch.zeros(kilobytes * KB // 8))}


def reference(pictures: int = 1) -> Reference:
    features = {"cls": torch.zeros(pictures, 4)}
    return Reference(features, features, "no encoder")


@pytest.fixture(autouse=True)
def room_for_four(monkeypatch):
    monkeypatch.setattr(ProjectionCache, "limit", 4 * KB)
    monkeypatch.setattr(ProjectionCache, "_all", WeakSet())  # without what other tests left


def test_references_share_one_budget_and_what_was_used_longest_ago_goes():
    a, b, c = reference(), reference(), reference(pictures=2)
    a.cache.put(NETWORK, "old", kv())
    a.cache.put(NETWORK, "used", kv())
    b.cache.put(Network(), "gone with its network", kv())
    b.cache.put(NETWORK, "b", kv())
    c.pictures[0].cache.put(NETWORK, "first", kv())
    assert a.cache.get(NETWORK, "old") and a.cache.get(NETWORK, "used") and a.cache.get(NETWORK, "old")
    c.pictures[1].cache.put(NETWORK, "second", kv())
    assert b.cache.get(NETWORK, "b") is None
    assert a.cache.get(NETWORK, "used") and c.pictures[0].cache.get(NETWORK, "first")
    a.cache.put(NETWORK, "large", kv(2))
    assert a.cache.get(NETWORK, "old") is None and c.pictures[1].cache.get(NETWORK, "second") is None
    assert c.pictures[0].cache.get(NETWORK, "first") and a.cache.get(NETWORK, "used") and a.cache.get(NETWORK, "large")


def test_an_entry_that_is_put_again_counts_once():
    a, b = reference(), reference()
    b.cache.put(NETWORK, "b", kv())
    for _ in range(4):
        a.cache.put(NETWORK, "a", kv(3))
    assert a.cache.get(NETWORK, "a") and b.cache.get(NETWORK, "b")


def test_the_newest_stays_even_if_it_is_larger_than_the_budget():
    a, b = reference(), reference()
    a.cache.put(NETWORK, "a", kv())
    b.cache.put(NETWORK, "large", kv(9))
    assert a.cache.get(NETWORK, "a") is None and b.cache.get(NETWORK, "large")
    a.cache.put(NETWORK, "a", kv())
    assert b.cache.get(NETWORK, "large") is None and a.cache.get(NETWORK, "a")


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_reference_that_is_gone_leaves_its_share_at_once(pictures):
    """As when ComfyUI drops a node's output: without waiting for Python to look for cycles."""
    gc.disable()
    try:
        a, b = reference(), reference(pictures)
        a.cache.put(NETWORK, "a", kv())
        for picture in b.pictures:
            picture.cache.put(NETWORK, "b", kv(3 // pictures))
        del b, picture
        a.cache.put(NETWORK, "another", kv(3))
        assert a.cache.get(NETWORK, "a")
    finally:
        gc.enable()


def test_many_threads_may_use_it(monkeypatch):
    monkeypatch.setattr(ProjectionCache, "limit", 100 * KB)
    references = [reference() for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(thread: int) -> None:
        for i in range(300):
            cache = references[(thread + i) % 4].cache if i % 3 else reference().cache
            cache.put(NETWORK, (thread, i), kv())
            cache.get(NETWORK, (thread, i - 1))

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    kept = [k.size for cache in ProjectionCache._all for entries in cache._entries.values() for k in entries.values()]
    assert 0 < sum(kept) <= ProjectionCache.limit
