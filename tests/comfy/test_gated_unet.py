"""The gated model in ComfyUI's sampling against a naive reference that recomputes everything in every block."""

import comfy.samplers
import pytest
import tiny
import torch
from flexip_pack.flexip_core.network.blocks import cross_attentions, text_projections
from flexip_pack.nodes import runtime

TOLERANCE = 1e-5
P, N = tiny.cond(1), tiny.cond(2)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


def texts(*pairs):
    return [(conditioning[0][0], null) for conditioning, null in pairs]


@pytest.fixture(scope="module", params=["outputs", "tokens"])
def network(request, model):
    return tiny.tiny_network(model, request.param)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("cfg", [1.0, 7.0], ids=["cfg-off", "cfg-on"])
def test_output_equals_naive_reference_for_batches_with_and_without_cfg(model, network, batch, cfg):
    link = tiny.link_for(network, tiny.tiny_reference())
    noise = tiny.noise_for(batch)
    got = tiny.ksample(runtime.attach(model, link), P, N, noise=noise, cfg=cfg)
    expected = tiny.ksample(tiny.naive_attach(model, [link], texts((P, False), (N, True))), P, N, noise=noise, cfg=cfg)
    assert tiny.relative_error(got, expected) < TOLERANCE
    assert tiny.relative_error(got, tiny.ksample(model, P, N, noise=noise, cfg=cfg)) > 1e-2, (
        "FlexIP must change the picture"
    )


@pytest.mark.parametrize("tokens", [(77, 77), (154, 77), (77, 154), (231, 154)])
def test_long_prompts_of_different_length_share_a_batch(model, network, tokens):
    positive, negative = tiny.cond(1, tokens[0]), tiny.cond(2, tokens[1])
    link = tiny.link_for(network, tiny.tiny_reference())
    got = tiny.ksample(runtime.attach(model, link), positive, negative)
    expected = tiny.ksample(
        tiny.naive_attach(model, [link], texts((positive, False), (negative, True))), positive, negative
    )
    assert tiny.relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("size", [(8, 16), (24, 8), (10, 14)])
def test_latents_need_not_be_square(model, network, size):
    link = tiny.link_for(network, tiny.tiny_reference())
    noise = tiny.noise_for(1, *size)
    got = tiny.ksample(runtime.attach(model, link), P, N, noise=noise)
    expected = tiny.ksample(tiny.naive_attach(model, [link], texts((P, False), (N, True))), P, N, noise=noise)
    assert tiny.relative_error(got, expected) < TOLERANCE


def test_cond_and_uncond_may_come_in_either_order_or_apart(model, network, monkeypatch):
    link = tiny.link_for(network, tiny.tiny_reference())
    expected = tiny.ksample(tiny.naive_attach(model, [link], texts((P, False), (N, True))), P, N)
    orders = []
    gated = runtime.attach(model, link)
    gated.add_wrapper_with_key(
        "apply_model",
        "spy",
        lambda executor, *a, **k: (orders.append(tuple(a[5]["cond_or_uncond"])), executor(*a, **k))[1],
    )
    assert tiny.relative_error(tiny.ksample(gated, P, N), expected) < TOLERANCE
    # no free memory: core runs positive and negative in calls of their own
    monkeypatch.setattr(gated.__class__, "get_free_memory", lambda self, device: 0)
    assert tiny.relative_error(tiny.ksample(gated, P, N), expected) < TOLERANCE
    assert {(1, 0), (1,), (0,)} <= set(orders)
    swapped = tiny.ksample(runtime.attach(model, link), N, P)
    naive = tiny.ksample(tiny.naive_attach(model, [link], texts((N, False), (P, True))), N, P)
    assert tiny.relative_error(swapped, naive) < TOLERANCE


def test_several_texts_in_one_conditioning_go_to_their_rows(model, network):
    positive = tiny.cond(1, batch=3)
    link = tiny.link_for(network, tiny.tiny_reference())
    noise = tiny.noise_for(3)
    got = tiny.ksample(runtime.attach(model, link), positive, N, noise=noise)
    expected = tiny.ksample(
        tiny.naive_attach(model, [link], texts((positive, False), (N, True))), positive, N, noise=noise
    )
    assert tiny.relative_error(got, expected) < TOLERANCE


def test_several_reference_pictures_join_their_tokens(model, network):
    link = tiny.link_for(network, tiny.tiny_reference(pictures=3))
    got = tiny.ksample(runtime.attach(model, link), P, N)
    expected = tiny.ksample(tiny.naive_attach(model, [link], texts((P, False), (N, True))), P, N)
    assert tiny.relative_error(got, expected) < TOLERANCE


def test_gates_per_row_equal_single_runs(model, network):
    reference = tiny.tiny_reference()
    gates = (0.0, 0.25, 0.5, 1.0)
    noise = tiny.noise_for(1)
    batch = tiny.ksample(
        runtime.attach(model, tiny.link_for(network, reference, gates)), P, N, noise=noise.repeat(4, 1, 1, 1)
    )
    for row, gate in zip(batch, gates):
        alone = tiny.ksample(runtime.attach(model, tiny.link_for(network, reference, gate)), P, N, noise=noise)
        assert tiny.relative_error(row, alone[0]) < TOLERANCE


@pytest.mark.parametrize("gate, alone", [(1.0, "preservation"), (0.0, "personalization")])
def test_the_ends_of_the_gate_are_one_adapter_alone(model, gate, alone):
    """Mode `outputs`: with the other adapter's values replaced by others, nothing changes."""
    network, other = tiny.tiny_network(model), tiny.tiny_network(model, seed=3)
    for address in other.block_widths:
        for name in other.adapters:
            if name != alone:
                other.projection(address, name).to_v.weight.mul_(-3)
    first = tiny.ksample(runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), gate)), P, N)
    second = tiny.ksample(runtime.attach(model, tiny.link_for(other, tiny.tiny_reference(), gate)), P, N)
    assert torch.equal(first, second)
    middle = [
        tiny.ksample(runtime.attach(model, tiny.link_for(n, tiny.tiny_reference(), 0.5)), P, N)
        for n in (network, other)
    ]
    assert not torch.equal(*middle)


def test_strength_zero_is_the_bare_model_bit_for_bit(model, network):
    gated = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(), strength=0.0))
    assert torch.equal(tiny.ksample(gated, P, N), tiny.ksample(model, P, N))


def test_outside_start_and_end_is_the_bare_model_bit_for_bit(model, network):
    sampling = model.get_model_object("model_sampling")
    link = tiny.link_for(network, tiny.tiny_reference(), start_percent=0.5, end_percent=1.0)
    outputs = {}
    for name, m in (("bare", model), ("gated", runtime.attach(model, link))):
        outputs[name] = []
        tiny.ksample(m, P, N, steps=4, callback=lambda step, x0, x, total, name=name: outputs[name].append(x0.clone()))
    start = sampling.percent_to_sigma(0.5)
    steps = comfy.samplers.calculate_sigmas(sampling, "normal", 4)[:-1]
    before = [float(s) > start for s in steps]
    assert any(before) and not all(before)
    for outside, bare, gated in zip(before, outputs["bare"], outputs["gated"]):
        assert torch.equal(bare, gated) == outside


def test_window_and_chain_follow_the_naive_reference(model):
    first = tiny.link_for(tiny.tiny_network(model, "outputs"), tiny.tiny_reference(), 0.3, end_percent=0.6)
    second = tiny.link_for(
        tiny.tiny_network(model, "tokens", seed=5), tiny.tiny_reference(11), 0.9, strength=0.5, start_percent=0.4
    )
    got = tiny.ksample(runtime.attach(runtime.attach(model, first), second), P, N, steps=5)
    expected = tiny.ksample(tiny.naive_attach(model, [first, second], texts((P, False), (N, True))), P, N, steps=5)
    assert tiny.relative_error(got, expected) < TOLERANCE


def test_every_cross_attention_is_patched_the_middle_included(model, network):
    gated = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference()))
    slots = gated.model_options["transformer_options"]["patches_replace"]["attn2"]
    addresses = {f"{kind}.{number}.{index}" for kind, number, index in (key for key in slots if len(key) == 3)}
    assert addresses == set(cross_attentions(model.model.diffusion_model))
    assert "middle.0.0" in addresses
    seen = set()
    for patch in {id(p): p for p in slots.values()}.values():
        original = patch.base_attention
        patch.base_attention = lambda *a, _address=patch.address, _original=original, **k: (
            seen.add(_address),
            _original(*a, **k),
        )[1]
    gated.model_options["transformer_options"].pop("callbacks", None)
    tiny.ksample(gated, P, N, steps=1)
    assert seen == addresses


def test_applying_again_on_a_cached_model_leaves_it_as_it_was(model, network):
    reference = tiny.tiny_reference()
    bare = tiny.ksample(model, P, N)
    branch = runtime.attach(model, tiny.link_for(network, reference, 0.8))
    first = tiny.ksample(branch, P, N)
    chained = [
        tiny.ksample(runtime.attach(branch, tiny.link_for(network, reference, gate)), P, N) for gate in (0.3, 0.9, 0.3)
    ]
    assert torch.equal(chained[0], chained[2]) and not torch.equal(chained[0], chained[1])
    assert torch.equal(tiny.ksample(model, P, N), bare)
    assert torch.equal(tiny.ksample(branch, P, N), first)
    assert len(runtime.links_of(branch)) == 1 and runtime.links_of(model) == ()


def test_callbacks_that_a_neighbour_adds_stay_on_its_clone(model, network):
    branch = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference()))
    before = tiny.ksample(branch, P, N)
    child = branch.clone()
    slots = child.model_options["transformer_options"]["patches_replace"]["attn2"]
    for patch in {id(p): p for p in slots.values()}.values():
        patch.add(
            lambda out, q, k, v, extra_options, weight, **kwargs: q * weight, weight=0.1, sigma_start=1e9, sigma_end=0.0
        )
    assert not torch.equal(tiny.ksample(child, P, N), before)
    assert torch.equal(tiny.ksample(branch, P, N), before)


def test_a_second_run_projects_nothing_and_another_prompt_only_what_depends_on_it(model, network):
    reference = tiny.tiny_reference()
    reports = []

    def run(positive, **kwargs):
        gated = runtime.attach(model, tiny.link_for(network, reference, **kwargs))
        gated.model_options["transformer_options"][runtime.LISTENER] = lambda told: reports.append(
            runtime.notices.full_text(told)
        )
        tiny.ksample(gated, positive, N)
        return next(line for line in reports[-1].splitlines() if line.startswith("K/V")).rstrip(".")

    assert run(P) == "K/V: 4 projected, 0 reused"
    assert run(P, gate=0.1, strength=0.4) == "K/V: 0 projected, 4 reused"
    assert run(tiny.cond(5)) == "K/V: 1 projected, 3 reused"


def test_interrupted_run_leaves_nothing_behind(model, network):
    gated = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference()))
    expected = tiny.ksample(gated, P, N, steps=4)

    class Interrupt(BaseException):
        pass

    def stop(step, *args):
        if step == 1:
            raise Interrupt

    with pytest.raises(Interrupt):
        tiny.ksample(gated, P, N, steps=4, callback=stop)
    assert runtime.RUN not in gated.model_options["transformer_options"]
    assert torch.equal(tiny.ksample(gated, P, N, steps=4), expected)


def test_fresh_adapters_start_as_a_no_op_or_from_the_unets_own_text_projections(model):
    bare = tiny.ksample(model, P, N)
    network = tiny.tiny_network(model)
    network.init_no_op()
    assert torch.equal(tiny.ksample(runtime.attach(model, tiny.link_for(network, tiny.tiny_reference())), P, N), bare)
    network.init_from_text(text_projections(model.model.diffusion_model))
    for address, attn in cross_attentions(model.model.diffusion_model).items():
        for name in network.adapters:
            assert torch.equal(network.projection(address, name).to_k.weight, attn.to_k.weight)
            assert torch.equal(network.projection(address, name).to_v.weight, attn.to_v.weight)
    started = runtime.attach(model, tiny.link_for(network, tiny.tiny_reference(5)))
    assert tiny.relative_error(tiny.ksample(started, P, N), bare) > 1e-3
