"""The mini world's own models: encoders that ComfyUI's side can load, a base whose interrupted training ends in the same bits."""

from __future__ import annotations

import pytest
import torch

from flexip_core.encoders import towers
from flexip_core.mini_world import encoders as stand_ins
from flexip_core.mini_world import files, judge, task, world
from flexip_core.mini_world.architecture import (
    COMFYUI_UNET,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    to_latents,
    to_pictures,
)
from flexip_core.mini_world.base import BaseRun, MiniBase, base_loss, make_unet
from flexip_core.mini_world.text import TextEncoder
from flexip_core.pictures import crop


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    g = generator(seed)
    return world.render(world.draw_subjects(n, g), g)[0]


@pytest.fixture(scope="module")
def dino() -> towers.DinoTower:
    return stand_ins.make_dino()


def test_enlarged_pictures_pass_our_preprocessing_unchanged():
    shown = stand_ins.enlarge(pictures(4))
    assert shown.shape == (4, 64, 64, 3) and 0 <= shown.min() and shown.max() <= 1
    prepared = torch.stack([crop.prepare(picture, None, "center", stand_ins.SIDE) for picture in shown])
    assert torch.equal(prepared, shown)
    assert torch.allclose(stand_ins.shrink(shown), pictures(4), atol=1e-6)


def test_patch_tokens_of_the_dino_stand_in_tell_every_pixel_of_their_patch(dino):
    seen = pictures(200)
    tokens = dino(stand_ins.pixels_for(dino, seen)).flatten(0, 1)
    pixels = torch.nn.functional.unfold(seen, 4, stride=4).transpose(1, 2).flatten(0, 1)
    one = torch.ones(len(tokens), 1)
    half = len(tokens) // 2
    fit = torch.linalg.lstsq(torch.cat([tokens[:half], one[:half]], 1).double(), pixels[:half].double(), driver="gelsd")
    rest = torch.cat([tokens[half:], one[half:]], 1).double() @ fit.solution - pixels[half:]
    assert rest.square().mean() < 0.01 * pixels.var()


def test_the_dino_stand_in_tells_places_apart(dino):
    flat = torch.full((1, 3, 16, 16), 0.2)
    tokens = dino(stand_ins.pixels_for(dino, flat))[0]
    assert torch.cdist(tokens, tokens)[~torch.eye(16, dtype=torch.bool)].min() > 0.1


def test_both_encoders_load_from_their_files_as_in_comfyui_and_give_the_same_features(tmp_path, dino):
    clip = stand_ins.untrained(3)
    task.save_clip(clip.eval(), tmp_path)
    files.save(dino.model.state_dict(), tmp_path / files.DINO_FILE)
    for tower, cfg, name in (
        (clip.tower, stand_ins.CLIP, files.CLIP_FILE),
        (dino, stand_ins.DINO, files.DINO_FILE),
    ):
        loaded = towers.load_tower(cfg, tmp_path / name)
        pixels = stand_ins.pixels_for(tower, pictures(3))
        assert torch.allclose(loaded(pixels), tower(pixels), atol=1e-5)
        assert loaded(pixels).shape[-1] == cfg.width


def test_the_judge_learns_within_seconds():
    found = judge.held_out_accuracy(judge.train(0, steps=60, batch=32), 256, 1)
    assert found["corner"] > 0.6 and found["ground"] > 0.5


def test_latents_lose_nothing():
    seen = pictures(5)
    assert to_latents(seen).shape == (5, LATENT_CHANNELS, 8, 8)
    assert torch.equal(to_pictures(to_latents(seen)), seen)


def test_captions_that_differ_in_one_word_have_different_tokens():
    text = TextEncoder(TEXT_WIDTH).eval()
    full = world.captions(world.draw_subjects(1, generator(2)))
    tokens = text(torch.cat([full, world.without(full, world.CORNER), torch.zeros_like(full)]))
    assert tokens.shape == (3, 4, TEXT_WIDTH)
    assert min((tokens[0] - tokens[1]).abs().max(), (tokens[0] - tokens[2]).abs().max()) > 1e-2


def test_the_unet_has_the_blocks_that_comfyui_is_told(tmp_path):
    from flexip_core.integrations.diffusers import block_widths

    found = block_widths(make_unet("meta"))
    down, up = COMFYUI_UNET["transformer_depth"], COMFYUI_UNET["transformer_depth_output"]
    assert len(found) == sum(down) + COMFYUI_UNET["transformer_depth_middle"] + sum(up)


@pytest.fixture(scope="module")
def small_runs():
    """Two steps at a quarter of the batch are enough to tell bits apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexip_core.mini_world.base.BATCH", 8)
        yield


def test_an_error_in_mean_or_strength_costs_the_base_more_than_the_same_energy_as_grain():
    noise = torch.randn(4, 12, 8, 8, generator=generator(5))
    weights = torch.ones(4)
    grain = torch.randn(noise.shape, generator=generator(6))
    grain = grain - grain.mean((2, 3), keepdim=True)
    errors = {"grain": grain, "mean": torch.ones_like(noise), "strength": noise}
    costs = {
        name: base_loss(noise + 0.1 * error / error.square().mean().sqrt(), noise, weights).item()
        for name, error in errors.items()
    }
    assert costs["grain"] == pytest.approx(0.01, rel=0.1)
    assert costs["mean"] > 3 * costs["grain"] and costs["strength"] > 10 * costs["grain"]


def test_an_interrupted_base_run_ends_in_the_same_bits(tmp_path, small_runs):
    whole = BaseRun(1, steps=4)
    assert whole.run(tmp_path / "whole", every=10)
    broken = BaseRun(1, steps=4)
    assert not broken.run(tmp_path / "state", every=2, until=lambda: broken.done == 2)
    rest = BaseRun(1, steps=4)
    assert rest.run(tmp_path / "state", every=10)
    for name, value in whole.average.items():
        assert torch.equal(value, rest.average[name]) and torch.equal(whole.parameters[name], rest.parameters[name])


def test_a_state_of_another_run_is_refused(tmp_path, small_runs):
    run = BaseRun(1, steps=1)
    run.run(tmp_path / "state")
    with pytest.raises(ValueError, match="seed 1 and 1 steps"):
        BaseRun(2, steps=1).load(tmp_path / "state")


def test_a_finished_base_is_read_back_without_diffusers(tmp_path):
    run = BaseRun(1, steps=1)
    files.save({key: value.half() for key, value in run.average.items()}, tmp_path / files.BASE)
    tensors, text = files.read_base(tmp_path / files.BASE)
    assert tensors.keys() == run.model["unet"].state_dict().keys()
    captions = world.captions(world.draw_subjects(3, generator(4)))
    assert torch.allclose(text(captions), run.model["text"].eval()(captions), atol=1e-2)


def test_the_base_speaks_the_trainers_protocol(dino):
    base = MiniBase(make_unet(), TextEncoder(TEXT_WIDTH), stand_ins.untrained(0).tower, dino)
    seen = pictures(2)
    features = base.features(seen)
    assert features["cls"].shape == (2, base.clip.width)
    assert features["patches"].shape == (2, 16, base.dino.width)
    assert base.empty_text().tokens.shape == (1, 4, base.text_width)
    assert torch.equal(base.to_pictures(base.to_latents(seen)), seen)
    assert base.alphas_cumprod.shape == (1000,) and base.alphas_cumprod[-1] < 0.005 < 0.99 < base.alphas_cumprod[0]
