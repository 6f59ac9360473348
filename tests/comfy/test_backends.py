"""What goes through which attention: the text through ComfyUI's choice, the reference through torch's own, in core's order."""

import comfy.ldm.modules.attention as core_attention
import comfy.ops
import pytest
import tiny
import torch
from flexip_pack.flexip_core.network.blocks import block_widths
from flexip_pack.nodes import runtime

P, N = tiny.cond(1), tiny.cond(2)
BACKENDS = ["attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch"]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_attention_backend_gives_the_same_picture(model, monkeypatch, backend, mode):
    link = tiny.link_for(tiny.tiny_network(model, mode), tiny.tiny_reference())
    gated = runtime.attach(model, link)
    expected = tiny.ksample(tiny.naive_attach(model, [link], [(P[0][0], False), (N[0][0], True)]), P, N)
    lengths = set()
    original = getattr(core_attention, backend)

    def counted(q, k, v, heads, *args, **kwargs):
        lengths.add(k.shape[1])
        return original(q, k, v, heads, *args, **kwargs)

    monkeypatch.setattr(core_attention, "optimized_attention", counted)
    assert tiny.relative_error(tiny.ksample(gated, P, N), expected) < 1e-5
    assert 77 in lengths, "the text goes through the chosen backend"
    ours = {7, 84} if mode == "outputs" else {84}  # 7 preservation tokens, and with the 77 of the prompt
    assert not ours & lengths, "the reference does not"


def test_an_override_of_the_attention_for_one_model_is_honoured_for_the_text(model):
    """ComfyUI's optimized_attention_override in transformer_options, as SageAttention nodes set it."""
    link = tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())
    calls = []

    def override(function, *args, **kwargs):
        calls.append(args[1].shape[1])
        return function(*args, **kwargs)

    expected = tiny.ksample(runtime.attach(model, link), P, N)
    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = override
    got = tiny.ksample(runtime.attach(other, link), P, N)
    assert torch.equal(got, expected) and 77 in calls


@pytest.mark.parametrize("mode, per_block", [("outputs", 2), ("tokens", 1)])
def test_the_backends_come_in_cores_own_order(model, monkeypatch, mode, per_block):
    """On a CPU there is one backend, so the numbers cannot tell: it is counted that core's wrapper is the one that is called."""
    ours, calls = {7, 77, 84}, []
    monkeypatch.setattr(core_attention, "optimized_attention", core_attention.attention_basic)
    original = comfy.ops.scaled_dot_product_attention
    monkeypatch.setattr(
        comfy.ops,
        "scaled_dot_product_attention",
        lambda q, k, v, **kw: (calls.append(k.shape[2]), original(q, k, v, **kw))[1],
    )
    gated = runtime.attach(model, tiny.link_for(tiny.tiny_network(model, mode), tiny.tiny_reference()))
    tiny.ksample(gated, P, N, steps=2)
    blocks = len(block_widths(model.model.diffusion_model)[0])
    assert len(calls) == per_block * blocks * 2 and set(calls) <= ours
