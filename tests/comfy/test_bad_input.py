"""Masks, numbers, prompts, latents and weights that are not what they should be (rows 4, 12 and 21 of the users' table): each node
says in one sentence which input is wrong, or does the right thing.
"""

from __future__ import annotations

import folder_paths
import pytest
import tiny
import torch
from bad import (  # noqa: F401 - fixtures among them
    INF,
    NAN,
    N,
    P,
    adapters,
    apply,
    encode,
    find_gate,
    finite,
    folders,
    gated,
    look,
    model,
    own_folders,
    picture,
    refused,
    sample,
    spoiled,
)
from flexip_pack.flexip_core.encoders import towers
from flexip_pack.flexip_core.files.checkpoint import save_checkpoint
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.untrained import mini
from flexip_pack.nodes.combine import FlexIPCombineReferences
from flexip_pack.nodes.conditioning import FlexIPConditioning
from flexip_pack.nodes.load import LoadFlexIPAdapters
from flexip_pack.nodes.schedule import FlexIPGateBatch, FlexIPGateSchedule
from flexip_pack.nodes.score import FlexIPScore
from test_reference_nodes import reference as reference_for_tiny

# --- masks ---

BAD_MASKS = {
    "nan": (spoiled(NAN, 1, 8, 8), "not numbers"),
    "infinite": (spoiled(-INF, 1, 8, 8), "not numbers"),
    "no pixels": (torch.ones(1, 0, 8), "no pixels"),
    "no masks": (torch.ones(0, 8, 8), "no pixels"),
    "a row": (torch.ones(8), "shape"),
    "five dimensions": (torch.ones(1, 1, 1, 8, 8), "shape"),
    "a number": (0.5, "shape"),
}


@pytest.mark.parametrize("what", BAD_MASKS)
def test_bad_masks_are_refused_by_name(adapters, model, what):
    mask, words = BAD_MASKS[what]
    for name in ("mask", "gate_mask"):
        text = refused("ApplyFlexIPGate", apply, model, **{name: mask})
        assert words in text and name.replace("_", " ") in text
    references = {"reference_0": reference_for_tiny(), "reference_1": reference_for_tiny(1)}
    combine = FlexIPCombineReferences.execute
    assert words in refused("FlexIPCombineReferences", combine, references, "one per region", "", mask)
    text = refused("EncodeReference", encode, adapters, picture(), "subject", (mask,))
    assert words in text and "mask" in text


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (5, 1, 9), (1, 1, 4000), (1, 1, 8, 8), (1, 8, 8, 1), (3, 64, 64)])
def test_masks_of_any_size_work(adapters, model, shape):
    for mask in (
        torch.ones(shape),
        torch.ones(shape) * 5,
        torch.ones(shape).half(),
        torch.ones(shape, dtype=torch.uint8),
    ):
        whole = tiny.ksample(apply(model, mask=mask).args[0], P, N, steps=1)
        assert torch.equal(whole, tiny.ksample(apply(model, mask=torch.ones(8, 8)).args[0], P, N, steps=1))
        assert finite(encode(adapters, picture(), "subject", (mask,)))


# --- numbers ---


@pytest.mark.parametrize("value", [NAN, INF, -INF, -0.01, 5.01, None, "0.5"])
def test_numbers_that_no_slider_gives_are_refused_by_name(model, gated, value):
    """Over a wire, or as NaN in a prompt, they pass ComfyUI's own check, and NaN would draw black pictures."""
    for name in ("gate", "strength", "start_percent", "end_percent"):
        assert f" {name} is " in refused("ApplyFlexIPGate", apply, model, **{name: value})
    for name in ("gate", "strength"):
        values = {"gate": 0.6, "strength": 1.0, name: value}
        assert f" {name} is " in refused("FlexIPConditioning", FlexIPConditioning.execute, P, **values)
    for name in ("start", "end"):
        values = {"start": 0.9, "end": 0.3, name: value}
        assert f" {name} is " in refused("FlexIPGateSchedule", FlexIPGateSchedule.execute, "linear", **values)
    for name in ("start_percent", "end_percent"):
        assert f" {name} is " in refused("FlexIPAttentionMaps", look, gated, **{name: value})
    if value not in (-0.01, 5.01):  # a target that no gate reaches is no fault
        assert " target is " in refused("FlexIPAutoGate", find_gate, gated, target=value)
    assert " denoise is " in refused("FlexIPSampler", sample, gated, denoise=value)
    if value != 5.01:
        assert " cfg is " in refused("FlexIPSampler", sample, gated, cfg=value)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.5), (1.0, 0.0)])
def test_a_start_that_is_not_before_the_end_is_refused(model, gated, start, end):
    assert "start_percent" in refused("ApplyFlexIPGate", apply, model, start_percent=start, end_percent=end)
    assert "start_percent" in refused("FlexIPAttentionMaps", look, gated, start_percent=start, end_percent=end)


@pytest.mark.parametrize(
    "text", ["nan", "0.5, inf", "1e999", "-0.1", "2", "0x1", "0.5, abc", "½", "1" * 400, "0," * 5000]
)
def test_lists_of_numbers_are_read_strictly(gated, text):
    assert "gates" in refused("FlexIPSampler", sample, gated, gates=text)
    assert "gates" in refused("FlexIPGateBatch", FlexIPGateBatch.execute, text, "repeat")
    assert "gates" in refused("FlexIPScore", FlexIPScore.execute, picture(), picture(), gates=text)
    if text not in ("2", "0," * 5000):
        assert "weights" in refused(
            "FlexIPCombineReferences",
            FlexIPCombineReferences.execute,
            {"reference_0": reference_for_tiny()},
            "average",
            text,
        )


# --- prompts and latents ---


def spoiled_cond(value: float) -> list:
    text = P[0][0].clone()
    text[0, 3, 5] = value
    return [[text, {}]]


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_prompt_that_is_not_numbers_is_refused_before_the_first_step(gated, value):
    with pytest.raises(ValueError) as error:
        tiny.ksample(gated, spoiled_cond(value), N)
    assert "a prompt on the sampler contains values that are not numbers" in str(error.value)
    with pytest.raises(ValueError, match="not numbers"):
        tiny.ksample(gated, P, spoiled_cond(value))
    before = tiny.ksample(gated, P, N)
    assert before.isfinite().all()


BAD_LATENTS = {
    "nan": ({"samples": spoiled(NAN, 1, 4, 8, 8)}, "not numbers"),
    "infinite": ({"samples": spoiled(INF, 2, 4, 8, 8)}, "not numbers"),
    "no pictures": ({"samples": torch.zeros(0, 4, 8, 8)}, "shape"),
    "no width": ({"samples": torch.zeros(1, 4, 8, 0)}, "shape"),
    "no batch": ({"samples": torch.zeros(4, 8, 8)}, "shape"),
    "another VAE's": ({"samples": torch.ones(1, 16, 8, 8)}, "16 channels"),
    "nothing": ({}, "shape"),
    "noise mask of nan": ({"samples": torch.ones(1, 4, 8, 8), "noise_mask": spoiled(NAN, 1, 64, 64)}, "noise mask"),
}


@pytest.mark.parametrize("what", BAD_LATENTS)
def test_bad_latents_are_refused_by_name(gated, what):
    latent, words = BAD_LATENTS[what]
    assert words in (text := refused("FlexIPSampler", sample, gated, latent_image=latent)) and "latent_image" in text
    assert (
        words in (text := refused("FlexIPAutoGate", find_gate, gated, latent_image=latent)) and "latent_image" in text
    )
    assert words in refused("FlexIPAttentionMaps", look, gated, latent=latent)


def test_small_and_long_latents_are_sampled(gated):
    for height, width in ((2, 2), (2, 64), (64, 2), (3, 5)):
        latent = {"samples": torch.zeros(1, 4, height, width)}
        assert sample(gated, latent_image=latent).args[0]["samples"].isfinite().all()
    empty = {
        "samples": torch.zeros(1, 16, 8, 8)
    }  # an empty latent of another base: ComfyUI gives it the right channels
    assert sample(gated, latent_image=empty).args[0]["samples"].shape == (1, 4, 8, 8)


# --- weights ---


def test_an_encoder_whose_answer_is_not_numbers_is_named(adapters, folders, monkeypatch):
    """Half precision may overflow in it, though its file is whole."""
    monkeypatch.setattr(towers.ClipTower, "forward", lambda self, pixels: pixels.new_full((len(pixels), 32), NAN))
    text = refused("EncodeReference", encode, adapters, picture())
    assert mini.MINI_CLIP_FILE in text and "not numbers" in text


def test_adapters_with_weights_that_are_not_numbers_are_named(folders):
    network = FlexIPNetwork(mini.MINI_CONFIG)
    with torch.no_grad():
        network.preservation.queries[0, 0, 0] = NAN
    save_checkpoint(network, folders / "flexip" / "nan.safetensors")
    folder_paths.filename_list_cache.clear()
    try:
        text = refused("LoadFlexIPAdapters", LoadFlexIPAdapters.execute, "nan.safetensors", "auto", "auto", "auto")
    finally:
        (folders / "flexip" / "nan.safetensors").unlink()
    assert "nan.safetensors" in text and "preservation.queries" in text
