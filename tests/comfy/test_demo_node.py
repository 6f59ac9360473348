"""FlexIPDemoModels with untrained weights: the stock nodes and ours run on what it gives, and compute what the trainer computes."""

import comfy.sample
import folder_paths
import pytest
import torch
from flexip_pack.flexip_core.files.checkpoint import save_checkpoint
from flexip_pack.flexip_core.integrations.diffusers import block_widths
from flexip_pack.flexip_core.mini_world import encoders, files, runs, sampling, task, world
from flexip_pack.flexip_core.mini_world.architecture import to_pictures
from flexip_pack.flexip_core.mini_world.base import BaseRun
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.training.start import make_network
from flexip_pack.nodes import demo
from flexip_pack.nodes.apply import ApplyFlexIPGate
from flexip_pack.nodes.demo import FlexIPDemoModels
from flexip_pack.nodes.encode import EncodeReference
from flexip_pack.nodes.sampler import FlexIPSampler

import nodes as core_nodes


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folder that ships with the pack, untrained; nothing in it is zero, so that every part of the way shows."""
    folder = tmp_path_factory.mktemp("weights")
    run = BaseRun(0, 1)
    g = torch.Generator().manual_seed(1)
    noisy = {key: value + 0.05 * torch.randn(value.shape, generator=g) for key, value in run.average.items()}
    files.save(noisy, folder / files.BASE)
    task.save_clip(encoders.untrained(2), folder)
    files.save(encoders.make_dino().model.state_dict(), folder / files.DINO_FILE)
    network = make_network(runs.config("outputs", 3, folder), task.load_world(folder))
    save_checkpoint(network, folder / files.ADAPTERS)
    return folder


@pytest.fixture
def models(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "WEIGHTS", weights)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return FlexIPDemoModels.execute(subject=5).args


def encode(clip, text: str):
    return core_nodes.CLIPTextEncode().encode(clip, text)[0]


def test_comfyuis_unet_predicts_the_same_noise_as_the_one_that_was_trained(models, weights):
    model, trained = models[0], task.load_world(weights)
    g = torch.Generator().manual_seed(4)
    latents, text = torch.randn(3, 12, 8, 8, generator=g), torch.randn(3, 4, 64, generator=g)
    times = torch.tensor([3, 400, 999])
    with torch.no_grad():
        expected = trained.unet(latents, times, encoder_hidden_states=text).sample
        got = model.model.diffusion_model(latents, times.float(), context=text)
    assert torch.allclose(got, expected, atol=1e-5) and expected.abs().max() > 0.1


def test_the_adapters_fit_the_model(models):
    model, network = models[0], models[3].network
    assert isinstance(network, FlexIPNetwork)
    assert network.block_widths == dict(block_widths(task.make_unet("meta")))
    ApplyFlexIPGate.execute(model, models[3], reference(models), 0.5, 1.0, 0.0, 1.0)


def reference(models):
    return EncodeReference.execute([models[3]], [models[4]], ["center"]).args[0]


def test_stock_text_encoding_gives_the_tokens_that_were_trained(models, weights):
    trained = task.load_world(weights)
    conditioning = encode(models[1], "a red (disc:1.3) on sand, top left")
    expected = trained.encode_text(world.read_words("a red disc on sand, top left")[None]).tokens
    assert torch.allclose(conditioning[0][0], expected, atol=1e-6)
    assert torch.allclose(encode(models[1], "")[0][0], trained.empty_text().tokens, atol=1e-6)
    assert set(conditioning[0][1]) == {"pooled_output"}


def test_clip_skip_and_other_settings_of_the_clip_socket_are_harmless(models):
    clip = core_nodes.CLIPSetLastLayer().set_last_layer(models[1], -2)[0]
    assert torch.equal(encode(clip, "a disc")[0][0], encode(models[1], "a disc")[0][0])


def test_the_vae_shows_pictures_at_64_pixels_and_reads_them_back(models):
    vae, picture = models[2], models[4]
    assert picture.shape == (1, 64, 64, 3)
    latent = core_nodes.VAEEncode().encode(vae, picture)[0]["samples"]
    assert latent.shape == (1, 12, 8, 8)
    assert torch.allclose(core_nodes.VAEDecode().decode(vae, {"samples": latent})[0], picture, atol=1e-5)


def test_encode_reference_gives_the_features_that_training_saw(models, weights):
    trained = task.load_world(weights)
    got = reference(models).features
    with torch.no_grad():
        expected = trained.features(world.test_set(1, 5).reference)
    for name in ("cls", "patches"):
        assert torch.allclose(got[name], expected[name], atol=1e-4)


@pytest.mark.parametrize("gate", [0.0, 0.6, 1.0])
def test_comfyuis_sampler_draws_what_the_evaluation_draws(models, weights, gate):
    """DDIM is Euler's method in ComfyUI's sigmas: K, V, gate, guidance, null reference and schedule all agree."""
    model, clip, _, adapters, _, prompt = models
    gated = ApplyFlexIPGate.execute(model, adapters, reference(models), gate, 1.0, 0.0, 1.0).args[0]
    trained, tests, noise = task.load_world(weights), world.test_set(1, 5), sampling.noise_for(1, 0)
    expected = sampling.draw(
        trained,
        tests.prompts("conflict"),
        noise,
        adapters.network,
        trained.features(tests.reference),
        gate,
        steps=3,
        cfg=2.0,
    )
    times = torch.linspace(999, 0, 4).round()[:-1]
    sigmas = torch.cat([model.get_model_object("model_sampling").sigma(times), torch.zeros(1)])
    got = comfy.sample.sample_custom(
        gated,
        noise,
        2.0,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        encode(clip, prompt),
        encode(clip, ""),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )
    assert torch.allclose(to_pictures(got), expected, atol=2e-3)
    assert expected.std() > 0.05


def test_the_gate_sweep_runs_on_stock_latents(models):
    model, clip, vae, adapters, _, prompt = models
    gated = ApplyFlexIPGate.execute(model, adapters, reference(models), 0.6, 1.0, 0.0, 1.0).args[0]
    empty = core_nodes.EmptyLatentImage().generate(64, 64, 1)[0]
    positive, negative = encode(clip, prompt), encode(clip, "")
    out = FlexIPSampler.execute(
        gated, 1, 3, 2.0, "euler", "normal", positive, negative, empty, 1.0, gates="0, 0.5, 1", vae=vae
    ).args
    assert out[0]["samples"].shape == (3, 12, 8, 8)
    one, other = out[0]["samples"][0], out[0]["samples"][2]
    assert (one - other).abs().max() > 1e-3
    assert out[1].shape[0] == 1 and out[1].isfinite().all()
    plain = core_nodes.common_ksampler(model, 1, 2, 2.0, "euler", "normal", positive, negative, empty)[0]
    assert core_nodes.VAEDecode().decode(vae, plain)[0].shape == (1, 64, 64, 3)


def test_subjects_differ_and_their_prompts_name_no_colour(models):
    other = FlexIPDemoModels.execute(subject=6).args
    assert not torch.equal(other[4], models[4])
    for prompt in (models[5], other[5]):
        words = world.read_words(prompt)
        assert words[world.HUE] == 0 and (words[:3] > 0).all()


def test_a_missing_file_is_named(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match="base.safetensors is missing"):
        FlexIPDemoModels.execute(subject=0)
