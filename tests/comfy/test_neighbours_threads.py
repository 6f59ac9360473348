"""One run, several threads and copies: MultiGPU CFG split as far as a CPU goes, and packs that copy a model's options whole."""

from __future__ import annotations

import copy
import dataclasses
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import comfy.model_management as mm
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from flexip_pack.flexip_core.run import lru
from flexip_pack.flexip_core.run import run as core_run
from flexip_pack.flexip_core.run.chain import Call, Entry, Setting
from flexip_pack.flexip_core.run.chain import Row as CallRow
from flexip_pack.flexip_core.run.layout import folded
from flexip_pack.flexip_core.run.run import LAYOUTS, LinkRun, Run
from flexip_pack.nodes import runtime

P, N = tiny.cond(1), tiny.cond(2)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def link(model: Any) -> Any:
    return tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())


def sample(model: Any) -> torch.Tensor:
    return tiny.ksample(model, P, N, steps=1)


def test_threads_of_one_run_do_not_take_each_others_layouts_away(model, link, monkeypatch):
    """Two GPUs ask for more layouts than are kept; a thread's own must still be there when it comes to return it."""
    monkeypatch.setattr(lru, "ROOM", 0)
    run = Run([LinkRun(link, 0, 100.0, 0.0)])
    run.prepare([Entry(P[0][0], False)], torch.float32, lambda link_run: tiny.CPU)
    calls = [Call((CallRow(0, item),), 8, 8, tiny.CPU, torch.float32) for item in range(3 * LAYOUTS)]
    threads, each = 8, 40
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(run.assemble, calls[n * 7 % len(calls)], None) for n in range(threads * each)]
            assert all(job.result()[0].keys() == jobs[0].result()[0].keys() for job in jobs)
    finally:
        sys.setswitchinterval(interval)
    assert run.links[0].counters.calls == threads * each


def test_threads_of_one_run_assemble_one_after_the_other(model, link, monkeypatch):
    """Each layout is asked for again after it was thrown out, by two threads in turns, while assembling takes its time."""
    monkeypatch.setattr(lru, "ROOM", 0)
    inside, most = [], []

    def slow(layout, *args, **kwargs):
        inside.append(layout)
        most.append((len(inside), len(run.links[0]._layouts)))
        time.sleep(0.002)
        inside.pop()
        return folded(layout, *args, **kwargs)

    calls = [Call((CallRow(0, item),), 8, 8, tiny.CPU, torch.float32) for item in range(LAYOUTS + 1)]
    alternating = [calls[n % len(calls)] for n in range(4 * len(calls))]
    gates = dataclasses.replace(link, gates=tuple(n / LAYOUTS for n in range(len(calls))))

    def started():
        run = Run([LinkRun(gates, 0, 100.0, 0.0, Setting(batch=len(calls)))])
        run.prepare([Entry(P[0][0], False)], torch.float32, lambda link_run: tiny.CPU)
        return run

    expected = {call: started().assemble(call, None) for call in calls}
    run = started()
    monkeypatch.setattr(core_run, "folded", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda call: run.assemble(call, None), alternating))
    for call, (branches, name) in zip(alternating, found):
        assert name == expected[call][1] and branches.keys() == expected[call][0].keys()
        for key, parts in branches.items():
            assert all(torch.equal(a.v, b.v) for a, b in zip(parts, expected[call][0][key], strict=True))
    assert max(threads for threads, _ in most) == 1 and max(layouts for _, layouts in most) < LAYOUTS
    counters = run.links[0].counters
    assert counters.calls == counters.active == len(alternating)


def test_a_pack_that_copies_the_options_whole_while_sampling_still_has_the_same_run(model, link):
    """Copying a run would copy K and V of every prompt, for every step; and its report would count nothing."""
    expected, reports, runs = sample(runtime.attach(model, link)), [], set()

    def copying(executor, x, timestep, options, seed):
        options = copy.deepcopy(options)
        runs.add(id(options["transformer_options"][runtime.RUN]))
        return executor(x, timestep, options, seed)

    gated = runtime.attach(model, link)
    gated.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "copying", copying)
    gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    assert torch.equal(sample(gated), expected)
    assert len(runs) == 1 and "1 of 1 model calls" in reports[0]


if find_spec("comfy_extras.nodes_multigpu"):  # not in the oldest that are supported
    from comfy_extras import nodes_multigpu

    def test_multigpu_cfg_split_gives_the_same_picture_from_two_threads(model, link, monkeypatch):
        """Core's own threads, one per device and model clone; two names of the CPU stand in for two GPUs."""
        devices = [torch.device("cpu"), torch.device("cpu", 0)]
        monkeypatch.setattr(mm, "current_loaded_models", [])  # core's node stumbles over models that are gone
        monkeypatch.setattr(mm, "get_all_torch_devices", lambda exclude_current=False: devices)
        monkeypatch.setattr(model, "cached_patcher_init", (tiny.tiny_model, ()))
        put = lambda m: nodes_multigpu.MultiGPUCFGSplitNode.execute(m, 2).args[0]
        expected, seen = sample(runtime.attach(model, link)), set()

        def spy(executor, *args, **kwargs):
            seen.add((str(args[5]["multigpu_thread_device"]), threading.get_ident(), bool(args[5]["flexip"])))
            return executor(*args, **kwargs)

        for split in (runtime.attach(put(model), link), put(runtime.attach(model, link))):
            seen.clear()
            split.add_wrapper_with_key("apply_model", "spy", spy)
            assert tiny.relative_error(sample(split), expected) < TOLERANCE
            assert len({thread for _, thread, _ in seen}) == 2
            assert {(device, acts) for device, _, acts in seen} == {("cpu", True), ("cpu:0", True)}

    def test_a_model_put_on_a_device_by_hand(model, link):
        put, expected = (
            lambda m: nodes_multigpu.SelectModelDeviceNode.execute(m, "cpu").args[0],
            sample(runtime.attach(model, link)),
        )
        assert torch.equal(sample(runtime.attach(put(model), link)), expected)
        assert torch.equal(sample(put(runtime.attach(model, link))), expected)
