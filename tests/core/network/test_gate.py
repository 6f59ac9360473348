"""The gate's arithmetic."""

import pytest
import torch

from flexip_core.network.attention import Branch, decoupled_attention
from flexip_core.network.gate import gated_branches, stack_rows


def branches(dtype=torch.float64, b=2, c=12):
    torch.manual_seed(0)
    make = lambda n: Branch(torch.randn(b, n, c, dtype=dtype), torch.randn(b, n, c, dtype=dtype))
    return make(4), make(7), torch.randn(b, 5, c, dtype=dtype), torch.randn(b, 5, c, dtype=dtype)


def output(mode, gate, strength=1.0, dtype=torch.float64):
    preservation, personalization, q, base = branches(dtype)
    gates = gate if isinstance(gate, tuple) else (gate,)
    return decoupled_attention(
        base, q, gated_branches(mode, gates, (strength,), preservation, personalization), heads=3
    )


@pytest.mark.parametrize("gate", [0.0, 0.3, 0.6, 1.0])
def test_weights_of_the_two_adapters_sum_to_the_strength(gate):
    ones = Branch(torch.ones(1, 4, 12), torch.ones(1, 4, 12))
    parts = gated_branches("outputs", (gate,), (0.8,), ones, ones)
    assert sum(part.v.mean().item() for part in parts) == pytest.approx(0.8)


def test_output_of_a_block_is_affine_in_the_gate():
    ends = output("outputs", 0.0), output("outputs", 1.0)
    for gate in (0.1, 0.25, 0.5, 0.77, 0.9):
        torch.testing.assert_close(
            output("outputs", gate), (1 - gate) * ends[0] + gate * ends[1], rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("gate, index", [(1.0, 0), (0.0, 1)])
def test_ends_equal_one_adapter_alone(gate, index):
    pair = branches()
    alone = decoupled_attention(pair[3], pair[2], (pair[index],), heads=3)
    assert torch.equal(output("outputs", gate), alone)


def test_tokens_mode_shares_one_softmax_so_its_ends_are_not_one_adapter_alone():
    preservation, personalization, q, base = branches()
    k = torch.cat([0.7 * preservation[0], 0.3 * personalization[0]], 1)
    v = torch.cat([0.7 * preservation[1], 0.3 * personalization[1]], 1)
    torch.testing.assert_close(output("tokens", 0.7, 0.5), decoupled_attention(base, q, (Branch(k, 0.5 * v),), heads=3))
    alone = decoupled_attention(base, q, (preservation,), heads=3)
    assert (output("tokens", 1.0) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_a_gate_per_row_equals_rows_with_that_gate(mode):
    both = output(mode, (0.2, 0.9), dtype=torch.float32)  # what factors per row are computed in
    torch.testing.assert_close(both[0], output(mode, 0.2, dtype=torch.float32)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(both[1], output(mode, 0.9, dtype=torch.float32)[1], rtol=0, atol=1e-6)
    preservation, personalization, *_ = branches(torch.float32)
    together = gated_branches(mode, (0.2, 0.9), (1.0,), preservation, personalization)
    for row, gate in enumerate((0.2, 0.9)):
        alone = gated_branches(mode, (gate,), (1.0,), preservation, personalization)
        for got, expected in zip(together, alone):
            assert torch.equal(got.k[row], expected.k[row]) and torch.equal(got.v[row], expected.v[row])


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_padding_of_shorter_conditionings_changes_nothing(mode):
    preservation, personalization, q, base = branches()
    short = Branch(personalization.k[:1, :3], personalization.v[:1, :3])
    padded = stack_rows([short, Branch(personalization.k[1:], personalization.v[1:])])
    assert padded.k.shape == personalization.k.shape and padded.mask is not None
    got = decoupled_attention(base, q, gated_branches(mode, (0.4,), (1.0,), preservation, padded), heads=3)
    first = Branch(preservation.k[:1], preservation.v[:1])
    alone = decoupled_attention(base[:1], q[:1], gated_branches(mode, (0.4,), (1.0,), first, short), heads=3)
    torch.testing.assert_close(got[:1], alone)


def test_one_adapter_alone_is_scaled_by_the_gate():
    preservation, _, q, base = branches()
    got = decoupled_attention(base, q, gated_branches("outputs", (0.25,), (2.0,), preservation, None), heads=3)
    full = decoupled_attention(base, q, (preservation,), heads=3)
    torch.testing.assert_close(got - base, 0.5 * (full - base))
