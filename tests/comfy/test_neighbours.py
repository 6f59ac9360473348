"""Other nodes in the same attn2 replace slots."""

import comfy.ldm.modules.attention as core_attention
import pytest
import tiny
import torch
from flexip_pack.nodes import runtime

P, N = tiny.cond(1), tiny.cond(2)
ROLES = [(P[0][0], False), (N[0][0], True)]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def link(model):
    return tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())


def theirs(q, k, v, extra_options):
    return core_attention.optimized_attention(q, k, v, extra_options["n_heads"]) + 0.1 * q


def keys(model):
    return [runtime._block(address) for address in tiny.config_for(model).blocks]


@pytest.mark.parametrize("three_part", [True, False], ids=["three-part key", "two-part key"])
def test_a_patch_that_was_there_before_still_acts(model, link, three_part):
    before = model.clone()
    for kind, number, index in keys(model):
        before.set_model_attn2_replace(theirs, kind, number, transformer_index=index if three_part else None)
    got = tiny.ksample(runtime.attach(before, link), P, N)
    assert tiny.relative_error(got, tiny.ksample(tiny.naive_attach(before, [link], ROLES), P, N)) < 1e-5
    assert tiny.relative_error(got, tiny.ksample(runtime.attach(model, link), P, N)) > 1e-3


@pytest.mark.parametrize("three_part", [True, False], ids=["three-part key", "two-part key"])
def test_blocks_that_a_later_node_takes_are_counted_in_the_report(model, link, three_part):
    after = runtime.attach(model, link).clone()
    kind, number, index = keys(model)[0]
    after.set_model_attn2_replace(theirs, kind, number, transformer_index=index if three_part else None)
    reports = []
    after.model_options["transformer_options"][runtime.LISTENER] = reports.append
    tiny.ksample(after, P, N)
    # under the two-part key theirs is never called: core looks the three-part key up first, and ours is there
    assert ("WARNING: another node took over 1 of" in reports[0]) == three_part
    assert ("WARNING: function was put on 1 blocks after FlexIP" in reports[0]) == (not three_part)


def test_single_layer_blocks_are_registered_under_both_keys_as_one_object(model, link):
    slots = runtime.attach(model, link).model_options["transformer_options"]["patches_replace"]["attn2"]
    assert slots["input", 1] is slots["input", 1, 0]
    assert ("input", 3) not in slots and {("input", 3, 0), ("input", 3, 1)} <= set(slots)
    child = runtime.attach(model, link).clone().model_options["transformer_options"]["patches_replace"]["attn2"]
    assert child["input", 1] is child["input", 1, 0]


def test_what_ip_adapter_packs_add_to_our_object_acts_within_its_sigmas(model, link):
    def added(out, q, k, v, extra_options, weight, **kwargs):
        return weight * q

    gated = runtime.attach(model, link)
    expected = tiny.ksample(gated, P, N, steps=4)
    outcomes = []
    for start, end in ((1e9, 0.0), (0.5, 0.4999), (1e9, 1.0)):
        child = gated.clone()
        slots = child.model_options["transformer_options"]["patches_replace"]["attn2"]
        for patch in {id(p): p for p in slots.values()}.values():
            patch.add(added, weight=0.1, sigma_start=start, sigma_end=end)
        outcomes.append(tiny.ksample(child, P, N, steps=4))
    always, never, early = outcomes
    assert torch.equal(never, expected)
    assert not torch.equal(always, expected) and not torch.equal(early, expected) and not torch.equal(early, always)
    assert torch.equal(tiny.ksample(gated, P, N, steps=4), expected)


def test_a_node_that_drops_our_options_gives_the_bare_picture_and_a_warning(model, link, caplog):
    gated = runtime.attach(model, link)
    del gated.model_options["transformer_options"][runtime.LINKS]
    with caplog.at_level("WARNING"):
        assert torch.equal(tiny.ksample(gated, P, N), tiny.ksample(model, P, N))
    assert "FlexIP does nothing" in caplog.text
