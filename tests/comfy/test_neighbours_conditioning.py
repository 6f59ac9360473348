"""Neighbours that come along with a prompt, or with the kind of model: ControlNet, GLIGEN, hooks, inpainting, LCM and turbo sampling.

users.md row 3. As in test_neighbours_core.py: the expected picture is theirs, with ours recomputed in every block from the bare parts.
DualCFG, PerpNeg and the other guiders are in test_guiders.py.
"""

from __future__ import annotations

from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.hooks
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import node_helpers
import pytest
import tiny
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_hooks, nodes_model_advanced
from flexip_pack.flexip_core.network.blocks import block_widths
from flexip_pack.nodes import runtime

import nodes

P, N, M = (tiny.cond(seed) for seed in (1, 2, 3))
ROLES = [(P[0][0], False), (N[0][0], True), (M[0][0], False)]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def link(model: Any) -> Any:
    return tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())


def check(model: Any, link: Any, run: Any, without: Any) -> None:
    """`run(model)` samples with the neighbour, `without(model)` alike but without it."""
    expected = run(tiny.naive_attach(model, [link], ROLES))
    gated = runtime.attach(model, link)
    assert torch.isfinite(expected).all()
    assert tiny.relative_error(run(gated), expected) < TOLERANCE
    assert tiny.relative_error(run(model), expected) > 1e-3, "FlexIP must act"
    assert tiny.relative_error(without(gated), expected) > 1e-4, "and so must they"


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    g = tiny.generator(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 0.5 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.0
            p.copy_(torch.randn(p.shape, generator=g) * scale + (p.dim() == 1) * float(name.endswith("weight")))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def control(model: Any) -> comfy.controlnet.ControlNet:
    """Random weights in the layout of the tiny UNet, none of its convolutions zero."""
    layout = {key: value for key, value in model.model.model_config.unet_config.items() if key != "out_channels"}
    layout |= {"hint_channels": 3, "dtype": torch.float32, "device": tiny.CPU}
    network = comfy.cldm.cldm.ControlNet(**layout, operations=comfy.ops.disable_weight_init)
    return comfy.controlnet.ControlNet(randomise(network, 5), load_device=tiny.CPU)


@pytest.mark.parametrize("both", [True, False], ids=["both prompts", "positive only"])
def test_controlnet(model, link, control, both):
    picture = torch.rand(1, 64, 64, 3, generator=tiny.generator(6))
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(P, N, control, picture, 0.8, 0.0, 0.9)
    negative = negative if both else N  # core gives the control of one prompt to the other one's copy
    check(model, link, lambda m: tiny.ksample(m, positive, negative), lambda m: tiny.ksample(m, P, N))


def test_controlnet_on_one_of_two_prompts(model, link, control):
    """Prompts with and without it run in calls of their own."""
    picture = torch.rand(1, 64, 64, 3, generator=tiny.generator(6))
    positive = nodes.ControlNetApply().apply_controlnet(P, control, picture, 0.8)[0] + M
    check(model, link, lambda m: tiny.ksample(m, positive, N), lambda m: tiny.ksample(m, P + M, N))


def test_gligen_boxes(model, link):
    """Its layers sit between self- and cross-attention of every block, so our query has passed them."""
    widths = {a.rsplit(".", 1)[0]: width for a, width in block_widths(model.model.diffusion_model)[0].items()}
    layers = [comfy.gligen.GatedSelfAttentionDense(width, 64, 2, width // 2) for width in widths.values()]
    boxes = randomise(comfy.gligen.Gligen(layers, comfy.gligen.PositionNet(64, 64), 64), 7)
    for layer in layers:
        layer.alpha_attn.fill_(1.0), layer.alpha_dense.fill_(1.0)
    patcher = comfy.model_patcher.ModelPatcher(boxes, load_device=tiny.CPU, offload_device=tiny.CPU)
    box = (
        torch.randn(1, 64, generator=tiny.generator(8)),
        4,
        4,
        1,
        2,
    )  # what GLIGENTextBoxApply makes: text, h, w, y, x
    positive = node_helpers.conditioning_set_values(P, {"gligen": ("position", patcher, [box])})
    check(model, link, lambda m: tiny.ksample(m, positive, N), lambda m: tiny.ksample(m, P, N))


def lora_hook(strength: float = 1.0) -> comfy.hooks.HookGroup:
    g, base = tiny.generator(7), "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    weights = {}
    for name, width in {"attn1_to_q": 32, "attn2_to_q": 32, "attn2_to_k": 64, "attn2_to_v": 64}.items():
        weights[f"{base}_{name}.lora_up.weight"] = torch.randn(32, 2, generator=g) * 0.3
        weights[f"{base}_{name}.lora_down.weight"] = torch.randn(2, width, generator=g) * 0.3
    return comfy.hooks.create_hook_lora(weights, strength, 1.0)


def test_scheduled_lora(model, link):
    """Off for the first half of the sampling, then on with 0.5, then with 1."""
    keyframes = None
    for strength, start in ((0.0, 0.0), (0.5, 0.3), (1.0, 0.7)):
        keyframes = nodes_hooks.CreateHookKeyframe().create_hook_keyframe(strength, start, keyframes)[0]
    hooks = nodes_hooks.SetHookKeyframes().set_hook_keyframes(lora_hook(), keyframes)[0]
    pair = nodes_hooks.PairConditioningSetProperties().set_properties(P, N, 1.0, "default", hooks=hooks)
    run = lambda pair: lambda m: tiny.ksample(m, *pair, steps=4)
    check(model, link, run(pair), run((P, N)))


def test_two_prompts_with_loras_of_their_own(model, link):
    """Each group of hooks is a batch of its own, with the UNet's weights changed in between."""
    positive = nodes_hooks.ConditioningSetProperties().set_properties(P, 1.0, "default", hooks=lora_hook())[0]
    positive += nodes_hooks.ConditioningSetProperties().set_properties(M, 1.0, "default", hooks=lora_hook(-1.0))[0]
    check(model, link, lambda m: tiny.ksample(m, positive, N), lambda m: tiny.ksample(m, P + M, N))


class Vae:
    """Four channels of means; the inpaint node needs no more of it."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small.mean(1, keepdim=True)], dim=1)


@pytest.mark.parametrize("noise_mask", [True, False])
def test_inpaint_model_with_nine_channels(noise_mask):
    model = tiny.tiny_model(in_channels=9)
    assert model.model.concat_keys
    link = tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference())
    pixels, mask = torch.rand(1, 64, 64, 3, generator=tiny.generator(6)), torch.zeros(1, 64, 64)
    mask[:, 16:48, 8:40] = 1

    def run(mask):
        positive, negative, latent = nodes.InpaintModelConditioning().encode(P, N, pixels, Vae(), mask, noise_mask)
        return lambda m: tiny.ksample(
            m, positive, negative, latent=latent["samples"], mask=latent.get("noise_mask"), denoise=0.8, steps=3
        )

    check(model, link, run(mask), run(torch.ones_like(mask)))


def turbo(model: Any) -> torch.Tensor:
    sigmas = custom.SDTurboScheduler.execute(model, 4, 1.0).args[0]
    guider, noise = custom.BasicGuider.execute(model, P).args[0], tiny.noise_for()
    sampler = comfy.samplers.sampler_object("lcm")
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)


@pytest.mark.parametrize(
    "put, run",
    [
        (lambda m: nodes_model_advanced.ModelSamplingDiscrete().patch(m, "lcm", False)[0], turbo),
        (
            lambda m: nodes_model_advanced.ModelSamplingContinuousEDM().patch(m, "eps", 20.0, 0.01)[0],
            lambda m: tiny.ksample(m, P, N, steps=4),
        ),
    ],
    ids=["LCM sampling in SDTurboScheduler's steps", "other sigmas"],
)
def test_a_window_is_in_percent_of_the_sampling_that_the_model_has_when_it_is_sampled(model, put, run):
    """In both orders of the nodes."""
    link = tiny.link_for(tiny.tiny_network(model), tiny.tiny_reference(), start_percent=0.2)
    expected = run(tiny.naive_attach(put(model), [link], ROLES))
    assert tiny.relative_error(run(runtime.attach(put(model), link)), expected) < TOLERANCE
    assert tiny.relative_error(run(put(runtime.attach(model, link))), expected) < TOLERANCE
    always = tiny.link_for(link.network, link.reference)
    assert tiny.relative_error(run(put(model)), expected) > 1e-4
    assert tiny.relative_error(run(put(runtime.attach(model, always))), expected) > 1e-4
