"""FlexIPConditioning: prompts that bring their own reference, gate and strength."""

import copy
import dataclasses
import logging

import comfy.conds
import naive
import pytest
import tiny
import torch
from comfy_execution.utils import CurrentNodeContext
from flexip_pack.flexip_core.run.schedule import GateBatch, GateCurve
from flexip_pack.nodes import runtime
from flexip_pack.nodes.combine import combine_references
from flexip_pack.nodes.conditioning import FlexIPConditioning

import nodes

TOLERANCE = 1e-5
P, N, M = (tiny.cond(seed) for seed in (1, 2, 3))
LEFT, RIGHT = (0, 0, 8, 4), (0, 4, 8, 4)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module", params=["outputs", "tokens"])
def network(request, model):
    return tiny.tiny_network(model, request.param)


def reference_for(network, seed=9, pictures=1):
    """A reference that says for which adapters it was encoded."""
    return dataclasses.replace(tiny.tiny_reference(seed, pictures), needs=network.needs())


def spec(network, seed=9, **kwargs):
    return naive.Spec(network, [reference_for(network, seed)], **kwargs)


def own(conditioning, gate=0.2, strength=1.0, reference=None, gate_schedule=None):
    return FlexIPConditioning.execute(conditioning, gate, strength, reference, gate_schedule).args[0]


def prompt(conditioning, null=False, area=None, brings=None):
    return naive.Prompt(conditioning[0][0][0], null, area, brings or {})


def half(conditioning, box):
    top, left, height, width = box
    return nodes.ConditioningSetArea().append(conditioning, width * 8, height * 8, left * 8, top * 8, 1.0)[0]


def check(model, specs, positive, negative, declared, batch=2, gates=None, steps=1, tolerance=TOLERANCE):
    noise, gated = tiny.noise_for(batch), model
    for one in specs:
        gated = runtime.attach(gated, one.link(gates))
    got = tiny.ksample(gated, positive, negative, noise=noise, steps=steps)
    expected = tiny.ksample(
        naive.attach(model, specs, declared, naive.Picture(batch, 8, 8)), positive, negative, noise=noise, steps=steps
    )
    assert tiny.relative_error(got, expected) < tolerance
    return got


@pytest.mark.parametrize("order", ["area of it", "it of an area"])
def test_one_of_two_regional_prompts_has_its_own_reference_gate_and_strength(model, network, order):
    """Set before or after Set Area; the negative's copy in that area gets nothing of it."""
    other = reference_for(network, 10, pictures=2)
    bring = lambda c: own(c, 0.2, 1.7, other)
    first = half(bring(P), LEFT) if order == "area of it" else bring(half(P, LEFT))
    brings = {0: {"reference": naive.Spec(network, [other]), "gates": [0.2], "strength": 1.7}}
    # without masks it does not matter which half a call of the negative shows
    declared = [prompt(P, False, LEFT, brings), prompt(M, False, RIGHT), prompt(N, True, LEFT)]
    plain = spec(network, strength=0.9)
    got = check(model, [plain], first + half(M, RIGHT), N, declared)
    without = tiny.ksample(
        runtime.attach(model, plain.link()), half(P, LEFT) + half(M, RIGHT), N, noise=tiny.noise_for(2), steps=1
    )
    assert tiny.relative_error(got[..., :4], without[..., :4]) > 1e-3
    assert tiny.relative_error(got[..., 4:], without[..., 4:]) < TOLERANCE


def test_mask_prompts_with_own_references_over_a_mask_of_the_link(model, network):
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :9] = 1
    other = reference_for(network, 10)
    positive = own(nodes.ConditioningSetMask().append(P, mask, "default", 1.0)[0], 0.9, 0.6, other)
    positive += own(nodes.ConditioningSetMask().append(M, 1 - mask, "default", 1.0)[0], 0.1)
    declared = [
        prompt(P, brings={0: {"reference": naive.Spec(network, [other]), "gates": [0.9], "strength": 0.6}}),
        prompt(M, brings={0: {"gates": [0.1]}}),
        prompt(N, True),
    ]
    everywhere = torch.rand(1, 16, 16, generator=tiny.generator(3))
    check(model, [spec(network, mask=everywhere, gate_mask=mask)], positive, N, declared)


def test_a_gate_alone_keeps_the_links_reference(model, network):
    declared = [prompt(P, brings={0: {"gates": [0.1], "strength": 0.5}}), prompt(N, True)]
    check(model, [spec(network, gates=[0.9], strength=1.5)], own(P, 0.1, 0.5), N, declared)


def test_own_gates_along_the_sampling_and_along_the_batch(model, network):
    points = ((0.0, 1.0), (0.7, 0.1))
    curve, batch = GateCurve(points, "test"), GateBatch((0.0, 0.8), "interpolate")
    positive = half(own(P, gate_schedule=curve), LEFT) + own(M, gate_schedule=batch)
    brings = {0: {"gates": naive.lines(points)}}, {0: {"gates": [0.0, 0.4, 0.8]}}
    declared = [prompt(P, False, LEFT, brings[0]), prompt(M, brings=brings[1]), prompt(N, True, LEFT)]
    check(model, [spec(network)], positive, N, declared, batch=3, steps=3, tolerance=1e-3)


def test_own_references_may_be_several(model, network):
    """One prompt with one per region, the other one with one reference: rows with and without regions share a call."""
    regions = torch.rand(2, 16, 16, generator=tiny.generator(4))
    two = [reference_for(network, 10), reference_for(network, 11, 3)]
    in_regions = combine_references(two, (1.0, 0.5), "one per region", regions, reference_for(network, 12))
    weighed = combine_references(two, (2.0, 0.5), "concatenate")
    positive = own(P, 0.3, 1.0, in_regions) + own(M, 0.8, 1.0, weighed)
    of = lambda combine, **kwargs: naive.Spec(network, two, combine=combine, **kwargs)
    declared = [
        prompt(P, brings={0: {"reference": of("one per region", weights=(1.0, 0.5), regions=regions), "gates": [0.3]}}),
        prompt(M, brings={0: {"reference": of("concatenate", weights=(2.0, 0.5)), "gates": [0.8]}}),
        prompt(N, True),
    ]
    check(model, [spec(network, gates=[0.5])], positive, N, declared, batch=3)


def test_the_last_link_of_a_chain_that_reads_such_a_reference_takes_it(model):
    first, second = tiny.tiny_network(model, "outputs"), tiny.tiny_network(model, "tokens", seed=5)
    links = [spec(first), spec(second, 11)]
    other = reference_for(second, 12)
    declared = [
        prompt(P, brings={1: {"reference": naive.Spec(second, [other]), "gates": [0.2]}}),
        prompt(N, True),
    ]
    check(model, links, own(P, 0.2, 1.0, other), N, declared)


def test_a_link_for_other_adapters_is_passed_over(model, monkeypatch):
    first, second = tiny.tiny_network(model, "outputs"), tiny.tiny_network(model, "tokens", seed=5)
    monkeypatch.setattr(second, "needs", lambda: first.needs()[:1])
    other = reference_for(first, 12)
    links = [spec(first), naive.Spec(second, [tiny.tiny_reference(11)])]
    declared = [
        prompt(P, brings={0: {"reference": naive.Spec(first, [other]), "gates": [0.2]}}),
        prompt(N, True),
    ]
    check(model, links, own(P, 0.2, 1.0, other), N, declared)


def test_a_link_that_is_switched_off_is_passed_over(model, network):
    """Strength 0 on the last Apply must not take a prompt's own reference away from the one before."""
    other = reference_for(network, 12)
    links = [spec(network), spec(network, 11, strength=0.0)]
    declared = [prompt(P, brings={0: {"reference": naive.Spec(network, [other]), "gates": [0.2]}}), prompt(N, True)]
    check(model, links, own(P, 0.2, 1.0, other), N, declared)


def test_zeroed_out_or_reused_as_negative_a_prompt_gets_the_null_reference(model, network):
    """ConditioningZeroOut copies all that a prompt carries, the reference included."""
    positive = own(P, 0.7, 1.0, reference_for(network, 10))
    zero = nodes.ConditioningZeroOut().zero_out(positive)[0]
    brings = {0: {"reference": naive.Spec(network, [reference_for(network, 10)]), "gates": [0.7]}}
    declared = [prompt(P, brings=brings), naive.Prompt(torch.zeros_like(P[0][0][0]), True, None, brings)]
    check(model, [spec(network)], positive, zero, declared)


def test_a_batch_of_texts_with_one_reference_of_its_own(model, network):
    texts = tiny.cond(1, batch=3)
    other = reference_for(network, 10)
    brings = {0: {"reference": naive.Spec(network, [other]), "gates": [0.2]}}
    declared = [naive.Prompt(text, False, None, brings) for text in texts[0][0]] + [prompt(N, True)]
    check(model, [spec(network)], own(texts, 0.2, 1.0, other), N, declared, batch=3)


@pytest.mark.parametrize("apply", [True, False], ids=["with Apply", "without"])
def test_cached_prompts_and_the_model_stay_as_they_are(model, network, apply):
    theirs = tiny.cond(4, model_conds={"theirs": comfy.conds.CONDConstant("of another node")})
    positive = half(own(P, 0.2, 1.0, reference_for(network, 10)), LEFT) + M + theirs + own(theirs)
    negative = tiny.cond(2)
    gated = runtime.attach(model, spec(network, mask=torch.ones(1, 4, 4)).link()) if apply else model
    state = lambda: [
        (id(text), {key: id(value) for key, value in extra.items()}, dict(extra.get("model_conds", {})))
        for text, extra in positive + negative
    ]
    before, bare = state(), tiny.ksample(model, P, N)
    first = tiny.ksample(gated, positive, negative)
    assert state() == before
    assert torch.equal(tiny.ksample(gated, positive, negative), first)
    assert torch.equal(tiny.ksample(model, P, N), bare)
    assert P[0][1] == {}, "the node copies the prompt that it gets"


def warnings_of(caplog, run):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run()
    return [record.getMessage() for record in caplog.records if "FlexIP" in record.getMessage()]


def test_without_apply_the_picture_is_the_plain_prompts_and_every_run_warns_once(model, network, caplog):
    positive = own(P, 0.2, 1.0, reference_for(network, 10)) + M
    for number in range(2):

        def run(number=number):
            with CurrentNodeContext(f"prompt {number}", "7"):
                got = tiny.ksample(model, positive, N, steps=3)
            assert tiny.relative_error(got, tiny.ksample(model, P + M, N, steps=3)) < TOLERANCE

        warnings = warnings_of(caplog, run)
        assert len(warnings) == 1 and "no Apply FlexIP Gate" in warnings[0]


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_with_apply_there_is_no_such_warning(model, network, caplog, strength):
    gated = runtime.attach(model, spec(network, strength=strength).link())
    positive = own(P, 0.2, 1.0, reference_for(network, 10))
    assert warnings_of(caplog, lambda: tiny.ksample(gated, positive, N)) == []


def test_the_report_counts_prompts_that_brought_something(model, network):
    reports = []
    gated = runtime.attach(model, spec(network).link())
    gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    tiny.ksample(gated, own(P) + own(M), N, steps=1)
    assert "note: 2 prompt(s) brought their own reference or gate (gate 0.2; gate 0.2)" in reports[0]


def test_another_gate_of_a_prompt_projects_nothing_again(model, network):
    other, link, reports = reference_for(network, 10), spec(network).link(), []
    gated = runtime.attach(model, link)
    gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    for gate in (0.2, 0.9):
        tiny.ksample(gated, own(P, gate, 0.3, other), N, steps=1)
    assert "K/V: 4 projected, 0 reused" in reports[0] and "K/V: 0 projected, 4 reused" in reports[1]


def test_a_deep_copy_of_a_prompt_shares_its_reference_and_projects_nothing_again(model, network):
    """As packs that edit conditionings make them; a reference holds up to hundreds of megabytes of kept K and V."""
    several = combine_references([reference_for(network, seed) for seed in (10, 11)], (1.0, 1.0), "concatenate")
    gated, reports = runtime.attach(model, spec(network).link()), []
    gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
        runtime.notices.full_text(told)
    )
    for reference in (reference_for(network, 10), several):
        assert copy.deepcopy(reference) is reference
        positive = own(P, 0.2, 1.0, reference)
        copied = copy.deepcopy(positive)
        assert copied[0][0] is not positive[0][0] and copied[0][1]["flexip"] is positive[0][1]["flexip"]
        first, second = (tiny.ksample(gated, prompt, N, steps=1) for prompt in (positive, copied))
        assert torch.equal(first, second) and "K/V: 0 projected" in reports[-1]


def test_a_reference_for_other_adapters_is_a_sentence(model, network):
    gated = runtime.attach(model, dataclasses.replace(spec(network).link(), title="right adapters"))
    positive = own(P, 0.2, 1.0, dataclasses.replace(tiny.tiny_reference(), needs=("other",)))
    with pytest.raises(ValueError, match="FlexIPConditioning: .*other adapters.*right adapters"):
        tiny.ksample(gated, positive, N)
