"""What FlexIP does once per run or less often: the Apply node, projections, the size of K and V."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

from flexip_pack.nodes import runtime
from flexip_pack.nodes.apply import check_base
from models import Bench

MB = 2**20


def measure_once(bench: Bench) -> list[tuple[str, str]]:
    """(what, measured) for one pair of adapters, 20 tokens of the reference and 77 of the prompt."""
    loaded = bench.network("outputs")
    adapters = SimpleNamespace(network=loaded[0], title="random")
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        check_base(bench.model, adapters)
        bench.gated("outputs", loaded=loaded)
        seconds.append(time.perf_counter() - start)
    return [
        ("Apply node, median of 20", f"{1000 * statistics.median(seconds):.1f} ms"),
        ("first run projects", _projections(bench, loaded)),
        (
            "re-queued with another gate, strength and seed, it projects",
            _projections(bench, loaded, gates=(0.1,), strength=0.7),
        ),
        ("re-queued with another prompt, it projects", _projections(bench, loaded, positive=5)),
        (f"K and V of one conditioning, {bench.dtype}", f"{_kv_megabytes(bench, loaded[0]):.1f} MB"),
        ("adapters, for comparison", f"{loaded[1].model_size() / MB:.0f} MB"),
    ]


def _projections(bench: Bench, loaded: tuple, positive: int = 1, **settings: Any) -> str:
    reports: list[str] = []
    model = bench.gated("outputs", loaded=loaded, **settings)
    model.model_options["transformer_options"][runtime.LISTENER] = reports.append
    bench.sample(model, 1, positive=positive)
    return next(line for line in reports[0].splitlines() if line.startswith("K/V")).removeprefix("K/V: ").rstrip(".")


def _kv_megabytes(bench: Bench, network: Any) -> float:
    """Preservation and personalization for the positive prompt, from the cache that the runs above filled."""
    entries = bench.reference.cache._entries[network]
    chosen = {key[0]: kept.size for key, kept in entries.items() if not key[1]}
    return sum(chosen.values()) / MB
