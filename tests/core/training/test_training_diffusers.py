"""FlexIP in diffusers' UNets: block addresses, and the gated output against attention done by hand."""

import math

import public_layouts as public
import pytest
import torch
import training_fakes as fakes
from diffusers.models.attention_processor import AttnProcessor2_0

from flexip_core.files import ip_adapter
from flexip_core.integrations.diffusers import (
    attention_names,
    block_widths,
    branches,
    cross_attentions,
    gated,
    text_projections,
)
from flexip_core.network.adapters import ADAPTERS
from flexip_core.training.start import make_network

SD15 = dict(public.SD15, block_out_channels=(32, 32, 64, 64), cross_attention_dim=fakes.TEXT, attention_head_dim=4)
B = 3


@pytest.fixture(scope="module")
def base():
    """SD1.5's own layout (16 cross-attentions), narrow."""
    base = fakes.FakeBase.__new__(fakes.FakeBase)
    base.unet = fakes.random_unet(**{**SD15, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "widths": ()})
    return base


def network_for(base, mode="outputs"):
    cfg = fakes.with_network(fakes.config("run", start="random"), gate_mode=mode)
    network = make_network(cfg, base)
    g = fakes.generator(2)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g) * (0.7 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.5)
                + 0.5 * (p.dim() == 1)
            )
    return network


def inputs(seed=0):
    g = fakes.generator(seed)
    return dict(
        x=torch.randn(B, 4, 16, 16, generator=g),
        t=torch.tensor([3, 500, 900]),
        text=torch.randn(B, 5, fakes.TEXT, generator=g),
        features={
            "cls": torch.randn(B, fakes.CLIP, generator=g),
            "patches": torch.randn(B, 4, fakes.DINO, generator=g),
        },
    )


def run(base, i, added=None):
    if added is None:
        return base.unet(i["x"], i["t"], encoder_hidden_states=i["text"]).sample
    with gated(base.unet, added):
        return base.unet(i["x"], i["t"], encoder_hidden_states=i["text"]).sample


def softmax(q, k, v, heads):
    """q (n, c), k, v (m, c) -> (n, c)"""
    parts = zip(*(t.chunk(heads, dim=1) for t in (q, k, v)))
    return torch.cat([torch.softmax(a @ b.T / math.sqrt(a.shape[1]), 1) @ c for a, b, c in parts], 1)


@pytest.fixture(autouse=True)
def own_processors(base):
    base.unet.set_attn_processor(AttnProcessor2_0())


class NaiveProcessor:
    """A cross-attention row by row, adapters called with one reference at a time as ComfyUI's side does."""

    def __init__(self, network, address, features, text, gates, strengths):
        self.network, self.address, self.features, self.text = network, address, features, text
        self.gates, self.strengths = gates, strengths

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        out = []
        for row in range(len(hidden_states)):
            q = attn.to_q(hidden_states[row])
            base = softmax(q, attn.to_k(self.text[row]), attn.to_v(self.text[row]), attn.heads)
            out.append(base + self.strengths[row] * self.added(q, row, attn.heads))
        return attn.to_out[0](torch.stack(out))

    def added(self, q, row, heads):
        features = {name: value[row : row + 1] for name, value in self.features.items()}
        kv = {}
        for name in ADAPTERS:
            tokens = self.network.tokens(name, features, self.text[row : row + 1])[0]
            projection = self.network.projection(self.address, name)
            kv[name] = tokens @ projection.to_k.weight.T, tokens @ projection.to_v.weight.T
        factors = {"preservation": self.gates[row], "personalization": 1 - self.gates[row]}
        if self.network.gate_mode == "outputs":
            return sum(factors[name] * softmax(q, *kv[name], heads) for name in ADAPTERS)
        k, v = (torch.cat([factors[name] * kv[name][i] for name in ADAPTERS]) for i in (0, 1))
        return softmax(q, k, v, heads)


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_gated_unet_equals_attention_by_hand_row_by_row(base, mode):
    network, i = network_for(base, mode), inputs()
    gates, strengths = (0.1, 0.5, 0.9), (1.0, 0.7, 0.4)
    with torch.no_grad():
        got = run(base, i, branches(network, i["features"], i["text"], gates, strengths))
        for address, attn in cross_attentions(base.unet).items():
            attn.processor = NaiveProcessor(network, address, i["features"], i["text"], gates, strengths)
        expected = run(base, i)
        base.unet.set_attn_processor(AttnProcessor2_0())
        bare = run(base, i)
    assert len(network.block_widths) == 16
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-5
    change = (got - bare).abs().flatten(1).amax(1) / bare.abs().max()
    assert (change > 1e-2).all(), "the reference must matter in every row"


def test_one_gate_and_one_strength_serve_all_rows(base):
    network, i = network_for(base), inputs()
    with torch.no_grad():
        one = run(base, i, branches(network, i["features"], i["text"], (0.3,), (0.5,)))
        rows = run(base, i, branches(network, i["features"], i["text"], (0.3,) * B, (0.5,) * B))
    torch.testing.assert_close(one, rows)


def test_one_adapter_alone_equals_the_other_gated_off(base):
    network, i = network_for(base), inputs()
    with torch.no_grad():
        alone = run(base, i, branches(network, i["features"], i["text"], (1.0,), adapters=["preservation"]))
        both = run(base, i, branches(network, i["features"], i["text"], (1.0,)))
    torch.testing.assert_close(alone, both)


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_gradients_reach_every_weight_of_both_adapters_through_the_frozen_unet(base, mode):
    network, i = network_for(base, mode), inputs()
    run(base, i, branches(network, i["features"], i["text"], (0.3, 0.6, 0.8))).square().mean().backward()
    silent = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
    assert all(p.grad is None for p in base.unet.parameters())


def test_gradients_are_those_of_finite_differences():
    base, i = fakes.FakeBase(in_channels=4, out_channels=4), inputs()
    network = network_for(base).double()
    base.unet.double()
    i = {
        k: ({n: f.double() for n, f in v.items()} if k == "features" else v.double() if k != "t" else v)
        for k, v in i.items()
    }

    def loss():
        return run(base, i, branches(network, i["features"], i["text"], (0.3, 0.6, 0.8))).square().mean()

    weight = network.personalization.cls_in.weight
    loss().backward()
    direction = torch.randn(weight.shape, generator=fakes.generator(3), dtype=torch.float64)
    with torch.no_grad():
        weight += 1e-5 * direction
        above = loss()
        weight -= 2e-5 * direction
        below = loss()
    torch.testing.assert_close((weight.grad * direction).sum(), (above - below) / 2e-5, rtol=1e-5, atol=1e-12)


def test_processors_are_back_afterwards_even_after_an_error(base):
    network, i = network_for(base), inputs()
    before = dict(base.unet.attn_processors)
    with torch.no_grad():
        bare = run(base, i)
        added = branches(network, i["features"], i["text"], (0.5,))
        run(base, i, added)
        assert torch.equal(run(base, i), bare)
        with pytest.raises(RuntimeError), gated(base.unet, added):
            base.unet(i["x"][:, :1], i["t"], encoder_hidden_states=i["text"])
    assert {name: id(p) for name, p in base.unet.attn_processors.items()} == {name: id(p) for name, p in before.items()}


def test_a_text_mask_is_respected(base):
    network, i = network_for(base), inputs()
    padded = torch.cat([i["text"], 5 * torch.ones(B, 2, fakes.TEXT)], 1)
    mask = torch.tensor([[1] * 5 + [0] * 2] * B)
    added = branches(network, i["features"], i["text"], (0.5,))
    with torch.no_grad(), gated(base.unet, added):
        got = base.unet(i["x"], i["t"], encoder_hidden_states=padded, encoder_attention_mask=mask).sample
        expected = base.unet(i["x"], i["t"], encoder_hidden_states=i["text"]).sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_another_base_and_foreign_processors_are_refused(base):
    network, i = network_for(base), inputs()
    added = branches(network, i["features"], i["text"], (0.5,))
    with pytest.raises(ValueError, match="a cross-attention at input.2.0"), gated(fakes.random_unet(), added):
        pass
    attn = cross_attentions(base.unet)["middle.0.0"]
    attn.processor = NaiveProcessor(network, "middle.0.0", i["features"], i["text"], (1.0,), (1.0,))
    with pytest.raises(RuntimeError, match="middle.0.0 already runs NaiveProcessor"), gated(base.unet, added):
        pass


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
def test_addresses_and_widths_are_those_of_the_real_bases(name):
    """ip_adapter.BASES is checked against ComfyUI's own models elsewhere."""
    unet = public.unet_on_meta({"SD1.5": public.SD15, "SDXL": public.SDXL}[name])
    text_width, blocks = ip_adapter.BASES[name]
    assert block_widths(unet) == blocks
    assert {to_k.shape[1] for to_k, _ in text_projections(unet).values()} == {text_width}
    names = set(attention_names(unet).values())
    assert names == set(public.cross_attention_names(unet))


def test_addresses_are_in_the_order_of_execution(base):
    called = []
    found = cross_attentions(base.unet)
    hooks = [m.register_forward_hook(lambda *_, a=a: called.append(a)) for a, m in found.items()]
    with torch.no_grad():
        run(base, inputs())
    for hook in hooks:
        hook.remove()
    assert called == list(found)
