"""FlexIP in diffusers against FlexIP in ComfyUI: the same base, adapters and references give the same UNet output and the same blocks."""

from __future__ import annotations

import pytest
import test_ip_adapter_vs_diffusers as bases
import tiny
import torch
from flexip_pack.flexip_core.integrations import diffusers as integration
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.network.blocks import block_widths
from flexip_pack.nodes import runtime


def random_network(model, mode: str) -> FlexIPNetwork:
    network = FlexIPNetwork(tiny.config_for(model, mode))
    g = tiny.generator(3)
    with torch.no_grad():
        for p in network.parameters():
            spread = 0.7 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.5
            p.copy_(torch.randn(p.shape, generator=g) * spread + 0.5 * (p.dim() == 1))
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
@pytest.mark.parametrize("name", bases.NARROW_CASES)
def test_diffusers_and_comfyui_gate_alike(name, mode):
    case, gate, strength = bases.NARROW_CASES[name], 0.3, 0.8
    weights = bases.random_unet(case.config)
    model = bases.comfy_model(case, weights)
    network, reference = random_network(model, mode), tiny.tiny_reference()
    link = tiny.link_for(network, reference, gate, strength=strength)
    bare = bases.sample_and_catch(model, case)
    ours = bases.sample_and_catch(runtime.attach(model, link), case)

    theirs = bases.diffusers_unet(case.config, weights)
    assert integration.block_widths(theirs) == block_widths(model.model.diffusion_model)[0]
    rows = [(reference.features, reference.null)[chunk] for chunk in ours.chunks]
    features = {key: torch.cat([row[key] for row in rows]) for key in reference.features}
    added = {}
    if case.base == "SDXL":
        pooled = [bases.conditionings(case)[chunk][0][1]["pooled_output"] for chunk in ours.chunks]
        sizes = torch.tensor([list(map(float, bases.SIZES.values()))] * 2)
        added = {"text_embeds": torch.cat(pooled), "time_ids": sizes}
    blocks = {}
    for address, attention in integration.cross_attentions(theirs).items():
        attention.to_out[0].register_forward_hook(
            lambda module, inputs, output, address=address: blocks.__setitem__(address, output)
        )
    branches = integration.branches(network, features, ours.context, (gate,), (strength,))
    with torch.no_grad(), integration.gated(theirs, branches):
        output = theirs(ours.x, ours.t, encoder_hidden_states=ours.context, added_cond_kwargs=added).sample
    assert tiny.relative_error(ours.output, output) < bases.TOLERANCE
    assert list(blocks) == list(ours.blocks)
    for address, block in blocks.items():
        assert tiny.relative_error(ours.blocks[address], block) < bases.TOLERANCE, address
        assert tiny.relative_error(ours.blocks[address], bare.blocks[address]) > 100 * bases.TOLERANCE, address
