"""Strengths per block in runs, and what holds for every control: nothing upstream changes, compiled runs stay right."""

import copy
import dataclasses
import functools

import naive
import pytest
import tiny
import torch
import torch._dynamo
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from flexip_pack.flexip_core.run.schedule import GateBatch, GateCurve
from flexip_pack.nodes import runtime
from flexip_pack.nodes.apply import ApplyFlexIPGate
from flexip_pack.nodes.depth import FlexIPBlocks
from flexip_pack.nodes.load import LoadedAdapters
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = 1e-5
P, N = tiny.cond(1), tiny.cond(2)
PROMPTS = [naive.Prompt(P[0][0][0], False), naive.Prompt(N[0][0][0], True)]
COARSE = {"input.3.0", "input.3.1", "middle.0.0", "output.0.0", "output.1.0"}
FINE = {"input.1.0", "output.2.0", "output.3.0", "output.3.1"}
ADDRESSES = sorted(COARSE | FINE)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module", params=["outputs", "tokens"])
def network(request, model):
    return tiny.tiny_network(model, request.param)


def spec(network, **kwargs):
    return naive.Spec(network, [tiny.tiny_reference()], **kwargs)


def depth(preservation=None, personalization=None, rest=1.0):
    """Factors per block address, `rest` where none is named."""
    named = {"preservation": preservation or {}, "personalization": personalization or {}}
    return {name: {address: factors.get(address, rest) for address in ADDRESSES} for name, factors in named.items()}


def check(model, one, batch=2, **kwargs):
    noise = tiny.noise_for(batch)
    got = tiny.ksample(runtime.attach(model, one.link()), P, N, noise=noise, steps=1)
    expected = tiny.ksample(naive.attach(model, [one], PROMPTS, naive.Picture(batch, 8, 8)), P, N, noise=noise, steps=1)
    assert tiny.relative_error(got, expected) < TOLERANCE
    return got


def test_every_block_has_its_own_factor_for_each_adapter(model, network):
    factors = st.fixed_dictionaries(dict.fromkeys(ADDRESSES, st.sampled_from([0.0, 0.3, 1.0, 2.5])))

    @settings(max_examples=8)  # each runs the UNet and the naive reference
    @given(factors, factors, st.booleans())
    def compare(preservation, personalization, masked):
        maps = torch.rand(1, 16, 16, generator=tiny.generator(3)) if masked else None
        chosen = {"preservation": preservation, "personalization": personalization}
        check(model, spec(network, depth=chosen, mask=maps, gate_mask=maps))

    compare()


def test_a_block_with_both_factors_zero_keeps_the_text_attention_bit_for_bit(model, network):
    off = {"input.3.1": 0.0, "output.3.0": 0.0}
    changed = set()

    def look(address, out, bare, grid):
        if not torch.equal(out, bare):
            changed.add(address)

    for mask in (None, torch.rand(1, 16, 16, generator=tiny.generator(3))):
        changed.clear()
        link = spec(network, depth=depth(off, off), mask=mask).link()
        tiny.ksample(naive.watch_blocks(runtime.attach(model, link), look), P, N, steps=1)
        assert changed == set(ADDRESSES) - set(off)


def test_factors_of_one_are_no_factors_and_all_zero_is_the_bare_model(model, network):
    plain = tiny.ksample(runtime.attach(model, spec(network).link()), P, N)
    assert torch.equal(tiny.ksample(runtime.attach(model, spec(network, depth=depth()).link()), P, N), plain)
    silent = runtime.attach(model, spec(network, depth=depth(rest=0.0)).link())
    assert torch.equal(tiny.ksample(silent, P, N), tiny.ksample(model, P, N))


def test_each_link_of_a_chain_has_its_own_depth(model):
    links = [
        spec(tiny.tiny_network(model, "outputs"), depth=depth({"input.1.0": 0.0}, {"middle.0.0": 2.0})),
        spec(
            tiny.tiny_network(model, "tokens", seed=5),
            depth=depth(rest=0.0) | {"preservation": dict.fromkeys(ADDRESSES, 0.7)},
        ),
    ]
    gated = model
    for one in links:
        gated = runtime.attach(gated, one.link())
    expected = tiny.ksample(naive.attach(model, links, PROMPTS, naive.Picture(1, 8, 8)), P, N)
    assert tiny.relative_error(tiny.ksample(gated, P, N), expected) < TOLERANCE


def applied(model, network, reference=None, **kwargs):
    """Through the nodes, as an artist wires them."""
    reference = reference or dataclasses.replace(tiny.tiny_reference(), needs=network.needs())
    patcher = tiny.link_for(network, reference).patcher
    adapters = LoadedAdapters("tiny", network, patcher, encoders={})
    values = {"gate": 0.6, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **kwargs}
    return ApplyFlexIPGate.execute(model, adapters, reference, **values).args[0]


def blocks(preservation, personalization="all", preservation_list="", personalization_list=""):
    return FlexIPBlocks.execute(preservation, personalization, preservation_list, personalization_list).args[0]


PRESETS = {  # of preservation, in the tiny model, which no table of blocks knows
    "all": set(ADDRESSES),
    "coarse": COARSE,
    "fine": FINE,
    "composition only": {"input.3.0", "input.3.1"},
    "style only": {"output.0.0", "output.1.0"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_reach_the_run_through_the_nodes(model, network, preset):
    expected = depth(dict.fromkeys(PRESETS[preset], 1.0), dict.fromkeys(ADDRESSES, 0.5), rest=0.0)
    one = spec(network, depth=expected)
    gated = applied(model, network, blocks=blocks(preset, "list", "", "all=0.5"))
    got = tiny.ksample(gated, P, N, steps=1)
    assert (
        tiny.relative_error(
            got, tiny.ksample(naive.attach(model, [one], PROMPTS, naive.Picture(1, 8, 8)), P, N, steps=1)
        )
        < TOLERANCE
    )


def report_of(gated):
    reports = []
    gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    tiny.ksample(gated, P, N, steps=1)
    return reports[0]


@pytest.mark.parametrize("preset, count", [("all", 9), ("coarse", 5), ("style only", 2)])
def test_the_report_counts_the_blocks_that_act(model, network, preset, count):
    report = report_of(applied(model, network, blocks=blocks(preset, preset)))
    assert f"{count} of 9 blocks patched" in report and "WARNING" not in report


def test_the_report_says_that_nothing_acts_where_every_block_is_off(model, network):
    report = report_of(applied(model, network, blocks=blocks("list", "list", "all=0", "all=0")))
    assert "0 of 9 blocks patched" in report and "WARNING: this gate changed nothing in this run" in report


def test_a_wrong_address_is_a_sentence_when_it_meets_the_model(model, network):
    with pytest.raises(ValueError, match="FlexIPBlocks: preservation_list names input.2"):
        applied(model, network, blocks=blocks("list", "all", "input.2=1"))


def everything(network, model):
    g = tiny.generator(6)
    factors = depth({"input.1.0": 0.0}, {"middle.0.0": 0.4})
    masks = torch.rand(2, 16, 16, generator=g)
    curve = spec(network, depth=factors, mask=masks, gate_mask=masks[:1]).link(
        GateCurve(((0.0, 1.0), (1.0, 0.0)), "test")
    )
    return runtime.attach(
        runtime.attach(model, curve), spec(network, window=(0.1, 0.9)).link(GateBatch((0.1, 0.9), "repeat"))
    )


def test_the_upstream_model_samples_the_same_before_and_after(model, network):
    noise = tiny.noise_for(3)
    once = runtime.attach(model, spec(network).link())
    bare, before = (tiny.ksample(m, P, N, noise=noise) for m in (model, once))
    gated = everything(network, once)
    first = tiny.ksample(gated, P, N, noise=noise)
    assert torch.equal(tiny.ksample(model, P, N, noise=noise), bare)
    assert torch.equal(tiny.ksample(once, P, N, noise=noise), before)
    assert torch.equal(tiny.ksample(gated, P, N, noise=noise), first)
    assert not torch.equal(first, before) and not torch.equal(before, bare)


def test_copied_model_options_share_the_links_and_sample_the_same(model, network):
    noise, gated = tiny.noise_for(2), everything(network, model)
    other = gated.clone()
    other.model_options = copy.deepcopy(gated.model_options)
    for mine, theirs in zip(runtime.links_of(gated), runtime.links_of(other), strict=True):
        assert mine is theirs
    assert torch.equal(tiny.ksample(other, P, N, noise=noise), tiny.ksample(gated, P, N, noise=noise))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_runs(network):
    """What may follow what on one compiled model, by name."""
    one, two = torch.rand(1, 16, 16, generator=tiny.generator(3)), torch.rand(2, 16, 16, generator=tiny.generator(4))
    curve = GateCurve(((0.0, 1.0), (1.0, 0.0)), "test")
    pair = functools.partial(naive.Spec, network, [tiny.tiny_reference(), tiny.tiny_reference(10)])
    return {
        "plain": spec(network).link(),
        "mask": spec(network, mask=one).link(),
        "gate mask": spec(network, gate_mask=one).link(),
        "both masks": spec(network, mask=one, gate_mask=one).link(),
        "masks": spec(network, mask=two).link(),
        "mask and gate masks": spec(network, mask=one, gate_mask=two).link(),
        "curve": spec(network).link(curve),
        "curve and gate mask": spec(network, gate_mask=one).link(curve),
        "batch": spec(network).link(GateBatch((0.1, 0.9), "repeat")),
        "depth": spec(network, depth=depth({"input.3.0": 0.0})).link(),
        "depth of the other": spec(network, depth=depth(None, {"input.3.0": 0.0})).link(),
        "depth halved": spec(network, depth=depth({"input.3.0": 0.5})).link(),
        "a block off": spec(network, depth=depth({"input.1.0": 0.0}, {"input.1.0": 0.0})).link(),
        "two references": pair(weights=(1.0, 1.0)).link(),
        "weighed": pair(weights=(1.0, 2.0)).link(),
        "regions": pair(weights=(1.0, 2.0), combine="one per region", regions=two).link(),
        "one each": pair(combine="one per batch item").link(),
    }


@pytest.mark.parametrize(
    "mode, names",
    [
        ("outputs", ["depth", "depth of the other", "mask", "gate mask"]),
        ("tokens", ["mask", "both masks", "curve and gate mask"]),
        *(pytest.param(mode, None, marks=pytest.mark.long) for mode in ("outputs", "tokens")),
    ],
    ids=["outputs", "tokens", "all in turn, outputs", "all in turn, tokens"],
)
def test_a_compiled_model_stays_right_when_something_changes(mode, names, fresh_dynamo):
    """TorchCompileModel drops the guards on what the patches read, so a stale graph would be used without a word."""
    model, noise = tiny.tiny_model(), tiny.noise_for(2)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    links = compiled_runs(tiny.tiny_network(model, mode))
    for name in names or [*links, *reversed(links)]:
        expected = tiny.ksample(runtime.attach(model, links[name]), P, N, noise=noise)
        got = tiny.ksample(runtime.attach(compiled, links[name]), P, N, noise=noise)
        assert tiny.relative_error(got, expected) < TOLERANCE, name
