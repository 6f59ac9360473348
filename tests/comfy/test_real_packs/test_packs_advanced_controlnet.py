"""Kosinkadink/ComfyUI-Advanced-ControlNet: its nodes around ComfyUI's ControlNet, and its Reference ControlNet, which swaps the
forward of every transformer block while it samples.
"""

from __future__ import annotations

import asyncio

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import pytest
import tiny
import torch
from flexip_pack.nodes import runtime

from . import layouts


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(**layouts.SD15)


@pytest.fixture(scope="module")
def link(model):
    return tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())


@pytest.fixture(scope="module")
def nodes(pack):
    listed = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return {node.define_schema().node_id: node for node in listed}


@pytest.fixture(scope="module")
def control(model):
    """Random weights in the layout of the tiny UNet."""
    layout = {key: value for key, value in model.model.model_config.unet_config.items() if key != "out_channels"}
    layout |= {"hint_channels": 3, "dtype": torch.float32, "device": tiny.CPU}
    network, g = comfy.cldm.cldm.ControlNet(**layout, operations=comfy.ops.disable_weight_init), tiny.generator(5)
    with torch.no_grad():
        for name, p in network.named_parameters():
            scale = 0.5 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.0
            p.copy_(torch.randn(p.shape, generator=g) * scale + (p.dim() == 1) * float(name.endswith("weight")))
    return comfy.controlnet.ControlNet(network.eval().requires_grad_(False), load_device=tiny.CPU)


def check(model, link, prompts, what):
    def run(model, prompts=prompts):
        torch.manual_seed(0)  # the Reference ControlNet draws its noise from torch's own generator
        return tiny.ksample(model, *prompts, steps=3, noise=tiny.noise_for(1, 16, 16))

    gated, expected = runtime.attach(model, link), run(tiny.naive_attach(model, [link], layouts.roles(model)))
    assert layouts.error(run(gated), expected, what) < 1e-5
    assert layouts.error(run(model), expected, f"{what}, alone") > 1e-3
    assert layouts.error(run(gated, layouts.prompts(model)), expected, f"FlexIP alone, without {what}") > 1e-4


def test_packs_controlnet_with_weights_and_keyframes(model, link, nodes, control):
    """A prompt's control is theirs from the start: there is no order of the two packs."""
    picture, mask = torch.rand(1, 128, 128, 3, generator=tiny.generator(6)), torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    keyframes = nodes["TimestepKeyframe"].execute(start_percent=0.3, strength=0.4).args[0]
    apply = nodes["ACN_AdvancedControlNetApply_v2"]
    prompts = apply.execute(
        *layouts.prompts(model), control, picture, 0.9, 0.0, 1.0, mask_optional=mask, timestep_kf=keyframes
    ).args
    check(model, link, prompts[:2], "Advanced-ControlNet, weights and keyframes")


@pytest.mark.parametrize("kind", ["reference_attn", "reference_adain", "reference_attn+adain"])
def test_packs_reference_controlnet(model, link, nodes, kind):
    reference = nodes["ACN_ReferenceControlNet"].execute(kind, 0.5, 1.0).args[0]
    latents = torch.randn(1, 4, 16, 16, generator=tiny.generator(7))

    class Vae:
        def vae_encode_crop_pixels(self, pixels):
            return pixels

        def encode(self, pixels):
            return latents

    picture = torch.rand(1, 128, 128, 3, generator=tiny.generator(6))
    proxy = nodes["ACN_ReferencePreprocessor"].execute(Vae(), picture, {"samples": torch.zeros(1, 4, 16, 16)}).args[0]
    apply = nodes["ACN_AdvancedControlNetApply_v2"]
    prompts = apply.execute(*layouts.prompts(model), reference, proxy, 1.0, 0.0, 1.0).args
    check(model, link, prompts[:2], f"Advanced-ControlNet, {kind}")
