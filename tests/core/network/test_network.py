"""The network against straightforward loop-and-matmul references, without ComfyUI."""

import math

import pytest
import torch
from networks import SMALL, config

from flexip_core.network.adapters import ADAPTERS, FlexIPNetwork, PersonalizationAdapter, PreservationAdapter
from flexip_core.network.attention import Branch, attention, decoupled_attention
from flexip_core.network.config import ClipConfig, DinoConfig, ResamplerConfig
from flexip_core.network.resampler import Resampler


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def naive_attention(q, k, v, heads):
    out = torch.zeros_like(q)
    d = q.shape[2] // heads
    for b in range(q.shape[0]):
        for h in range(heads):
            for i in range(q.shape[1]):
                row = slice(h * d, (h + 1) * d)
                scores = torch.stack([q[b, i, row] @ k[b, j, row] / math.sqrt(d) for j in range(k.shape[1])])
                weights = scores.exp() / scores.exp().sum()
                out[b, i, row] = sum(weights[j] * v[b, j, row] for j in range(k.shape[1]))
    return out


def naive_norm(x, norm):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def naive_linear(x, linear):
    return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)


def naive_resampler(resampler, latents, context):
    context = naive_linear(context, resampler.context_in)
    for layer in resampler.layers:
        q = naive_norm(latents, layer.norm_latents)
        kv = torch.cat([naive_norm(context, layer.norm_context), q], 1)
        mixed = naive_attention(
            *(naive_linear(x, w) for x, w in ((q, layer.to_q), (kv, layer.to_k), (kv, layer.to_v))), layer.heads
        )
        latents = latents + naive_linear(mixed, layer.to_out)
        hidden = naive_linear(naive_norm(latents, layer.norm_ff), layer.ff_in)
        latents = latents + naive_linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), layer.ff_out)
    return naive_norm(naive_linear(latents, resampler.out), resampler.norm_out)


def test_attention_equals_loops():
    q, k, v = torch.randn(2, 4, 12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    torch.testing.assert_close(attention(q, k, v, 3), naive_attention(q, k, v, 3))


def test_attention_ignores_masked_tokens():
    q, k, v = torch.randn(2, 4, 12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    mask = torch.tensor([True, True, True, False, False]).expand(2, 1, 1, 5)
    torch.testing.assert_close(attention(q, k, v, 3, mask), naive_attention(q, k[:, :3], v[:, :3], 3))


def test_decoupled_attention_adds_each_branch():
    base, q, k, v = torch.randn(2, 4, 12), torch.randn(2, 4, 12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    got = decoupled_attention(base, q, (Branch(k, v), Branch(k * 2, v * 3)), 3)
    torch.testing.assert_close(got, base + naive_attention(q, k, v, 3) + naive_attention(q, k * 2, v * 3, 3))


def test_resampler_equals_loops():
    resampler = Resampler(SMALL, context_width=7, out_width=9)
    latents, context = torch.randn(2, 3, 24), torch.randn(2, 4, 7)
    torch.testing.assert_close(
        resampler(latents, context), naive_resampler(resampler, latents, context), rtol=1e-4, atol=1e-5
    )


def test_a_context_of_one_token_is_not_ignored():
    resampler = Resampler(SMALL, context_width=7, out_width=9)
    latents = torch.randn(1, 3, 24)
    assert (resampler(latents, torch.randn(1, 1, 7)) - resampler(latents, torch.randn(1, 1, 7))).abs().max() > 1e-3


def test_preservation_adapter_equals_loops():
    adapter = PreservationAdapter(config())
    cls, patches = torch.randn(2, 10), torch.randn(2, 4, 14)
    semantic = naive_linear(cls, adapter.cls_in).view(2, 2, 24)
    expected = torch.cat(
        [
            naive_resampler(adapter.semantic, semantic, patches),
            naive_resampler(adapter.detail, adapter.queries.repeat(2, 1, 1), patches),
        ],
        1,
    )
    torch.testing.assert_close(adapter(cls, patches), expected, rtol=1e-4, atol=1e-5)


def test_personalization_adapter_equals_loops():
    adapter = PersonalizationAdapter(config())
    text, cls = torch.randn(2, 6, 20), torch.randn(1, 10)
    context = naive_linear(cls, adapter.cls_in).view(1, 3, 24).repeat(2, 1, 1)
    expected = naive_resampler(adapter.resampler, naive_linear(text, adapter.text_in), context)
    torch.testing.assert_close(adapter(text, cls), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text_width, inner",
    [(768, {"input.1.0": 320, "middle.0.0": 1280}), (2048, {"input.4.0": 640, "middle.0.9": 1280})],
    ids=["SD1.5", "SDXL"],
)
def test_shapes_for_the_widths_of_real_bases(text_width, inner):
    cfg = config(
        text_width=text_width,
        blocks=inner,
        clip=ClipConfig(),
        dino=DinoConfig(),
        detail_tokens=16,
        semantic_tokens=4,
        resampler=ResamplerConfig(depth=1),
    )
    network = FlexIPNetwork(cfg)
    features = {"cls": torch.randn(2, 1024), "patches": torch.randn(2, 9, 1024)}
    text = torch.randn(3, 154, text_width)
    tokens = {name: network.tokens(name, features, text) for name in ADAPTERS}
    assert tokens["preservation"].shape == (1, 2 * 20, text_width)
    assert tokens["personalization"].shape == (3, 154, text_width)
    for name in ADAPTERS:
        for address, (k, v) in network.project(name, tokens[name]).items():
            assert k.shape == v.shape == (*tokens[name].shape[:2], inner[address])


def test_no_op_start_adds_exactly_nothing_and_still_trains():
    network = FlexIPNetwork(config())
    network.init_no_op()
    features = {"cls": torch.randn(1, 10), "patches": torch.randn(1, 4, 14)}
    kv = network.project("preservation", network.tokens("preservation", features))
    q = torch.randn(1, 3, 16)
    out = attention(q, *kv["input.1.0"], 2)
    assert torch.equal(out, torch.zeros_like(out))
    (out + torch.randn_like(out)).pow(2).sum().backward()
    assert network.projection("input.1.0", "preservation").to_v.weight.grad.abs().max() > 0


def test_start_from_the_unets_own_text_projections():
    network = FlexIPNetwork(config())
    own = {address: (torch.randn(inner, 20), torch.randn(inner, 20)) for address, inner in network.block_widths.items()}
    network.init_from_text(own)
    tokens = torch.randn(1, 4, 20)
    for name in ADAPTERS:
        for address, (k, v) in network.project(name, tokens).items():
            torch.testing.assert_close(k, tokens @ own[address][0].T)
            torch.testing.assert_close(v, tokens @ own[address][1].T)
