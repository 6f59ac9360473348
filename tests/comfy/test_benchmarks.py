"""benchmarks/run.py on a narrow UNet: what it counts, and that its tables can be made."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import comfy.memory_management
import comfy.model_management
import models

spec = importlib.util.spec_from_file_location("benchmark_run", BENCHMARKS / "run.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

NARROW = ["--comfyui", "unused", "--size", "64", "--channels", "32", "--batch", "1"]


@pytest.fixture(scope="module")
def bench():
    return models.Bench("sd15", torch.float32, 64, 32)


@pytest.fixture(scope="module")
def result(bench):
    options = benchmark.parser().parse_args([*NARROW, "--diffusers", "--only", "two"])  # our pair, and diffusers' two
    with mock.patch.object(models, "Bench", lambda *args: bench):
        result = benchmark.measure(options)
    import once

    return result | {"runs": once.measure_runs(bench), "sizes": once.measure_sizes(bench)}


def test_one_call_is_measured_beside_the_peer_with_the_same_files(result):
    ours, theirs = result["calls"][0]["rows"]
    assert (ours["name"], theirs["name"]) == ("FlexIP, two IP-Adapter plus files", "diffusers, two plus adapters")
    assert ours["blocks"] == theirs["blocks"] == result["blocks"] == 16
    assert ours["linear_layers"] == 0 and ours["syncs"] == 0 and theirs["linear_layers"] > 4 * 16
    assert 0 < ours["operations"] < theirs["operations"] and 0 < ours["gflop"] < theirs["gflop"]


def test_a_queued_run_pays_only_for_what_changed(result):
    layers = {name: cost["matmuls"] for name, cost in result["runs"].items()}
    assert layers["first queue"] > layers["another prompt"] > 0
    assert layers["another gate and strength"] == layers["another gate schedule"] == 0


def test_the_table_has_a_line_for_each(result):
    text = benchmark.table(result)
    for name in (*result["runs"], *(row["name"] for row in result["calls"][0]["rows"])):
        assert text.count(f"| {name} |") == 1
    assert dict(result["sizes"])["with another gate and strength it projects"].startswith("0 projected")


def test_blocks_that_no_key_reaches_do_not_count_as_acting(bench):
    model = bench.model.clone()
    for key in (("input", 1), ("input", 2, 0), ("middle", 1)):  # the last is no block of the UNet
        model.set_model_attn2_replace(lambda *args: args[0], *key[:2], transformer_index=(*key, None)[2])
    assert benchmark.acting_blocks(model, bench) == 2


def test_a_model_made_under_dynamic_vram_is_the_same(bench, monkeypatch):
    """Its layers have no weights until they are loaded; its memory manager needs a GPU and is left out here."""
    if not hasattr(comfy.memory_management, "aimdo_enabled"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    with monkeypatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        patch.setattr(comfy.model_management, "WINDOWS", True)  # older ones have such layers there only
        lazy = models.Bench("sd15", torch.float32, 64, 32)
        network = lazy.network("outputs")[0].state_dict()
    for key, value in bench.network("outputs")[0].state_dict().items():
        assert torch.equal(network[key], value)
    state = lazy.model.model.diffusion_model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in bench.model.model.diffusion_model.state_dict().items())
    assert tiny.relative_error(lazy.sample(lazy.model, 1), bench.sample(bench.model, 1)) == 0
