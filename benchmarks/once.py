"""What FlexIP does once per run or less often: whole runs, the Apply node, the size of K and V."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from types import SimpleNamespace
from typing import Any

from counters import count
from flexip_pack.flexip_core.run.schedule import GateCurve
from flexip_pack.nodes import runtime
from flexip_pack.nodes.apply import check_base
from models import Bench

MB = 2**20


def measure_runs(bench: Bench) -> dict[str, dict[str, float]]:
    """Whole runs of one step over the bare model's, in the order in which an artist queues them."""
    reference = bench.new_reference()
    curve, other = (GateCurve(((0.0, high), (1.0, 0.2)), "linear") for high in (0.9, 0.7))
    queued: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("first queue", {}, {}),
        ("another gate and strength", {"gates": (0.1,), "strength": 0.7}, {}),
        ("another prompt", {}, {"positive": 5}),
        ("a gate schedule, first time", {"gates": curve}, {}),
        ("another gate schedule", {"gates": other}, {}),
    ]
    bench.sample(bench.model, 1)
    bare = count(lambda: bench.sample(bench.model, 1))
    found = {}
    for name, settings, run in queued:
        model = bench.gated("outputs", reference=reference, **settings)
        found[name] = dataclasses.asdict(count(functools.partial(bench.sample, model, 1, **run)) - bare)
    return found


def measure_sizes(bench: Bench) -> list[tuple[str, str]]:
    """(what, measured) for one pair of adapters, 20 tokens of the reference and 77 of the prompt."""
    loaded = bench.loaded("outputs")
    adapters = SimpleNamespace(network=loaded[0], title="random")
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        check_base(bench.model, adapters)
        bench.gated("outputs", loaded=loaded)
        seconds.append(time.perf_counter() - start)
    reference = bench.new_reference()
    projected = (
        ("first run projects", {}, {}),
        ("with another gate and strength it projects", {"gates": (0.1,), "strength": 0.7}, {}),
        ("with another prompt it projects", {}, {"positive": 5}),
    )
    return [
        ("Apply node, median of 20", f"{1000 * statistics.median(seconds):.1f} ms"),
        *((what, _projections(bench, reference, settings, run)) for what, settings, run in projected),
        (f"K and V of one conditioning, {bench.dtype}", f"{_kv_bytes(bench, loaded[0]) / MB:.1f} MB"),
        ("adapters, which no step needs", f"{loaded[1].model_size() / MB:.0f} MB"),
    ]


def _projections(bench: Bench, reference: Any, settings: dict[str, Any], run: dict[str, Any]) -> str:
    reports: list[Any] = []
    model = bench.gated("outputs", reference=reference, **settings)
    model.model_options["transformer_options"][runtime.LISTENER] = reports.extend
    bench.sample(model, 1, **run)
    return (
        next(line for line in reports[0].text.splitlines() if line.startswith("K/V")).removeprefix("K/V: ").rstrip(".")
    )


def _kv_bytes(bench: Bench, network: Any) -> int:
    """Preservation and personalization of the positive prompt, as a run hands them to every block."""
    from flexip_pack.flexip_core.run.reference import kv_bytes

    features = {name: value.to(bench.dtype) for name, value in bench.reference.features.items()}
    text = bench.conditioning(1)[0][0].to(bench.dtype)
    return sum(kv_bytes(network.project(name, network.tokens(name, features, text))) for name in network.adapters)
