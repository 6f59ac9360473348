"""Small UNets with the block numbers of the real ones, which these packs have written into them."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from flexip_pack.flexip_core.network.blocks import block_of, block_widths, cross_attentions

SD15 = {
    "num_res_blocks": [2] * 4,
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
SDXL = {
    "num_res_blocks": [2] * 3,
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3,
    "context_dim": 2048,  # by which the packs tell SDXL
}


def prompts(model: Any) -> tuple[list, list]:
    width = block_widths(model.model.diffusion_model)[1]
    return tuple([[torch.randn(1, 77, width, generator=tiny.generator(seed)), {}]] for seed in (1, 2))


def roles(model: Any) -> list[tuple[torch.Tensor, bool]]:
    positive, negative = prompts(model)
    return [(positive[0][0], False), (negative[0][0], True)]


def sample(model: Any, steps: int = 2, **kwargs: Any) -> torch.Tensor:
    return tiny.ksample(model, *prompts(model), steps=steps, noise=tiny.noise_for(1, 16, 16), **kwargs)


def random_pairs(model: Any, seed: int = 6) -> dict[str, torch.Tensor]:
    """to_k_ip and to_v_ip in the order of the published files: inputs, outputs, middle."""
    g, (widths, text_width) = tiny.generator(seed), block_widths(model.model.diffusion_model)
    order = sorted(widths, key=lambda address: ("input", "output", "middle").index(address.split(".")[0]))
    return {
        f"{2 * number + 1}.to_{x}_ip.weight": torch.randn(widths[address], text_width, generator=g) / text_width**0.5
        for number, address in enumerate(order)
        for x in "kv"
    }


class Added:
    """Base attention, then ours recomputed, then their callbacks on the result: what their object would do around ours."""

    def __init__(self, naive: tiny.NaiveBlock, theirs: Any):
        self.naive, self.theirs = naive, theirs

    def __call__(self, q, k, v, extra_options):
        out = self.naive(q, k, v, extra_options)
        for callback, kwargs in zip(self.theirs.callback, self.theirs.kwargs) if self.theirs else ():
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out


def theirs_after_ours(model: Any, link: Any, theirs: Any) -> Any:
    """`theirs`: the bare model with their node on it, from which the callbacks come."""
    slots = theirs.model_options["transformer_options"]["patches_replace"]["attn2"]
    expected = tiny.naive_attach(model, [link], roles(model))
    for address in cross_attentions(model.model.diffusion_model):
        kind, number, index = block_of(address)
        naive = expected.model_options["transformer_options"]["patches_replace"]["attn2"][kind, number, index]
        patch = slots.get((kind, number, index), slots.get((kind, number)))
        expected.set_model_attn2_replace(Added(naive, patch), kind, number, transformer_index=index)
    return expected


def error(got: torch.Tensor, expected: torch.Tensor, what: str) -> float:
    """Printed too, with -s or -rP: the numbers for docs/works_with.md."""
    value = tiny.relative_error(got, expected)
    print(f"{what}: {value:.1e}")
    return value
