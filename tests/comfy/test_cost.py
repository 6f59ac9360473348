"""What FlexIP adds to one UNet call, counted: the bars of the README's benchmark table, on the real block layout."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from counters import per_call
from models import Bench

BLOCKS = 16
PER_CALL = 1  # core concatenates the tags of positive and negative: a handful of numbers on the CPU, in no block


@pytest.fixture(scope="module")
def bench():
    return Bench("sd15", torch.float32, size=64, channels=32)


@pytest.fixture(scope="module")
def bare(bench):
    return per_call(lambda steps: bench.sample(bench.model, steps))


def cost(bench, mode, gates=(0.6,), batch=1, **settings):
    model = bench.gated(mode, gates, **settings)
    return per_call(lambda steps: bench.sample(model, steps, batch))


@pytest.mark.parametrize("mode, most", [("tokens", 2), ("outputs", 4)])
def test_a_constant_gate_adds_a_handful_of_operations_and_nothing_else(bench, bare, mode, most):
    extra = cost(bench, mode) - bare
    assert 0 < extra.operations <= most * BLOCKS + PER_CALL
    assert extra.syncs == 0 and extra.matmuls == 0


@pytest.mark.parametrize("mode", ["tokens", "outputs"])
def test_a_window_reads_one_value_per_call(bench, bare, mode):
    extra = cost(bench, mode, start_percent=0.0, end_percent=0.999) - bare
    assert extra.operations <= 6 * BLOCKS + PER_CALL + 1  # and the sigma
    assert extra.syncs == 1 and extra.matmuls == 0


@pytest.mark.parametrize("mode", ["tokens", "outputs"])
def test_gates_per_row_cost_no_more_than_one_gate(bench, mode):
    bare = per_call(lambda steps: bench.sample(bench.model, steps, 4))
    extra = cost(bench, mode, (0.0, 0.3, 0.6, 1.0), batch=4) - bare
    assert extra.operations <= 6 * BLOCKS + PER_CALL and extra.syncs == 0 and extra.matmuls == 0


def test_cost_grows_linearly_with_links(bench, bare):
    one = cost(bench, "outputs") - bare
    chained = bench.gated("outputs")
    loaded = bench.network("outputs")
    from flexip_pack.flexip_core.run import Link
    from flexip_pack.nodes import runtime

    two = runtime.attach(chained, Link(*loaded, bench.reference, (0.3,)))
    both = per_call(lambda steps: bench.sample(two, steps)) - bare
    assert both.operations - PER_CALL == 2 * (one.operations - PER_CALL) and both.syncs == 0


def test_a_run_of_the_naive_reference_would_be_noticed(bench, bare):
    """The counters see projections: the naive reference has them in every block."""
    link = tiny.link_for(bench.network("outputs")[0], bench.reference)
    texts = [(bench.conditioning(1)[0][0], False), (bench.conditioning(2)[0][0], True)]
    naive = tiny.naive_attach(bench.model, [link], texts)
    extra = per_call(lambda steps: bench.sample(naive, steps)) - bare
    assert extra.matmuls > 100 and extra.syncs > 0
