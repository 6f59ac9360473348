"""What FlexIP adds to one UNet call, counted: the bars of the table in docs/benchmarks.md, on the real block layout."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from counters import count, peak_megabytes, per_call
from flexip_pack.flexip_core.network.adapters import ADAPTERS
from flexip_pack.flexip_core.run.schedule import GateCurve
from models import Bench, Link, Reference, runtime

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


@pytest.mark.parametrize(
    "copy, uploads",
    [
        (lambda t: t.to("meta"), 1),
        (lambda t: t.to("meta", torch.float16), 1),
        (lambda t: torch.empty(3, device="meta").copy_(t), 1),
        (lambda t: torch.tensor([1.0, 2.0], device="meta"), 1),
        (lambda t: torch.as_tensor([1.0, 2.0], device="meta"), 1),
        (lambda t: t.to("meta", non_blocking=True), 0),
        (lambda t: torch.empty(3, device="meta").copy_(t, non_blocking=True), 0),
        (lambda t: torch.full((2,), 1.0, device="meta"), 0),
        (lambda t: torch.tensor([1.0, 2.0]).to(torch.float16), 0),
    ],
)
def test_copies_to_a_device_that_the_host_waits_for_are_counted(copy, uploads):
    """A second device stands for the GPU."""
    assert count(lambda: copy(torch.ones(3))).uploads == uploads


def test_cost_grows_linearly_with_links(bench, bare):
    one = cost(bench, "outputs") - bare
    chained = bench.gated("outputs")
    loaded = bench.network("outputs")
    two = runtime.attach(chained, Link(*loaded, bench.reference, (0.3,)))
    both = per_call(lambda steps: bench.sample(two, steps)) - bare
    assert both.operations - PER_CALL == 2 * (one.operations - PER_CALL) and both.syncs == 0


def test_a_run_of_the_naive_reference_would_be_noticed(bench, bare):
    """The counters see projections: the naive reference has them in every block."""
    link = tiny.link_for(bench.network("outputs")[0], bench.reference)
    texts = [(bench.conditioning(1)[0][0], False), (bench.conditioning(2)[0][0], True)]
    naive = tiny.naive_attach(bench.model, [link], texts)
    extra = count(lambda: bench.sample(naive, 1)) - bare
    assert extra.matmuls > 100 and extra.syncs > 0


def test_cost_is_linear_in_the_number_of_reference_pictures(bench, bare):
    """20 tokens more per picture: the same operations, and the same work for each further picture."""
    loaded = bench.network("outputs")
    extras = []
    for pictures in (1, 2, 3):
        features = {
            name: value.repeat(pictures, *[1] * (value.dim() - 1)) for name, value in bench.reference.features.items()
        }
        reference = Reference(features, {name: torch.zeros_like(value) for name, value in features.items()}, "random")
        model = runtime.attach(bench.model, Link(*loaded, reference, (0.6,)))
        extras.append(per_call(lambda steps, model=model: bench.sample(model, steps)) - bare)
    assert len({extra.operations for extra in extras}) == 1
    first, second = extras[1].gflop - extras[0].gflop, extras[2].gflop - extras[1].gflop
    assert first > 0 and second == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("mode", ["tokens", "outputs"])
def test_peak_memory_is_the_bare_runs_plus_k_and_v(mode):
    bench = Bench("sd15", torch.float32, size=256, channels=64)
    model = bench.gated(mode)
    bench.sample(model, 1)  # K and V rest in the reference's cache from here on
    bare = peak_megabytes(lambda: bench.sample(bench.model, 1))
    gated = peak_megabytes(lambda: bench.sample(model, 1))
    rows = 2  # positive and negative
    k_and_v = rows * 2 * 97 * sum(bench.widths.values()) * 4 / 1e6
    assert 0.9 * k_and_v < gated - bare < 1.1 * k_and_v
    assert bare > 2 * k_and_v, "the bare run must be large enough for the comparison to mean something"


def test_a_schedule_costs_two_more_operations_per_block_and_one_read_per_call(bench, bare):
    extra = cost(bench, "outputs", GateCurve(((0.0, 0.9), (1.0, 0.2)), "linear")) - bare
    assert (
        extra.operations <= 6 * BLOCKS + PER_CALL + 2
    )  # V rescaled for both adapters; the sigma read and stepped over
    assert extra.syncs == 1 and extra.matmuls == 0


@pytest.mark.parametrize("mode, most", [("tokens", 3), ("outputs", 6)])
def test_a_mask_costs_one_more_multiplication_per_branch(bench, bare, mode, most):
    extra = cost(bench, mode, mask=torch.rand(1, 64, 64)) - bare
    assert extra.operations <= most * BLOCKS + PER_CALL + 1  # and the map of rows and columns
    assert extra.syncs == 0 and extra.matmuls == 0


def test_a_block_without_strength_costs_nothing(bench, bare):
    one = cost(bench, "outputs") - bare
    blocks = bench.network("outputs")[0].block_widths
    depth = {name: {address: float(address.startswith("output")) for address in blocks} for name in ADAPTERS}
    extra = cost(bench, "outputs", depth=depth) - bare
    acting = sum(address.startswith("output") for address in blocks)
    assert extra.operations - PER_CALL == (one.operations - PER_CALL) * acting // BLOCKS


def with_patches(model, before, after=None):
    model = model.clone()
    model.set_model_attn2_patch(before)
    if after is not None:
        model.set_model_attn2_output_patch(after)
    return model


def repeated(q, k, v, options):
    negative, positive = q.chunk(2)  # in core's order
    texts, more = k.chunk(2)
    return torch.cat([negative, positive, positive]), *[torch.cat([texts, more, more])] * 2


def merged(out, options):
    negative, positive, again = out.chunk(3)
    return torch.cat([negative, (positive + again) / 2])


THEIRS = {
    "moves no rows": (lambda q, k, v, options: (q, k * 0.9, v * 0.9), None),
    "computes q anew": (lambda q, k, v, options: (q * 0.9, k, v), None),
    "repeats rows": (repeated, merged),
}


@pytest.mark.parametrize(
    "theirs, mode, most",
    [
        ("moves no rows", "outputs", 4),
        ("computes q anew", "outputs", 4),
        ("repeats rows", "outputs", 4),
        ("repeats rows", "tokens", 2),
    ],
)
def test_beside_a_patch_that_may_move_rows_a_call_costs_what_it_costs_without(bench, theirs, mode, most):
    """Where it puts them is found out once per run, from the first call."""
    before, after = THEIRS[theirs]
    bare = per_call(lambda steps: bench.sample(with_patches(bench.model, before, after), steps))
    both = with_patches(bench.gated(mode), before, after)
    extra = per_call(lambda steps: bench.sample(both, steps)) - bare
    assert 0 < extra.operations <= most * BLOCKS + PER_CALL
    assert extra.syncs == 0 and extra.matmuls == 0 and extra.uploads == 0


def test_a_run_whose_patches_leave_q_alone_waits_no_more_than_without_them(bench):
    gated, (before, _) = bench.gated("outputs"), THEIRS["moves no rows"]
    alone, both, theirs = gated, with_patches(gated, before), with_patches(bench.model, before)
    bench.sample(gated, 1)
    syncs = [count(lambda model=model: bench.sample(model, 2)).syncs for model in (bench.model, alone, theirs, both)]
    assert syncs[1] - syncs[0] == syncs[3] - syncs[2]
