"""A checkpoint file as the trainer reads it (diffusers, transformers) against ComfyUI's own loader: the same text, latents, UNet,
and, through the real nodes, the same gated output."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import comfy.sd
import folder_paths
import pytest
import test_ip_adapter_vs_diffusers as bases
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from flexip_pack.flexip_core.files.checkpoint import save_checkpoint
from flexip_pack.flexip_core.integrations import diffusers as integration
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.training import sd
from flexip_pack.flexip_core.training.config import NetworkConfig, TrainConfig
from flexip_pack.flexip_core.training.start import make_network
from flexip_pack.flexip_core.untrained import mini, mini_checkpoints
from flexip_pack.nodes import files
from flexip_pack.nodes.apply import ApplyFlexIPGate
from flexip_pack.nodes.encode import EncodeReference
from flexip_pack.nodes.load import LoadFlexIPAdapters

TOLERANCE = bases.TOLERANCE
PROMPTS = [
    "",
    "a cat",
    "A photo of my Dog, wearing sunglasses; it's 35mm & grainy!!",
    "café naïve, 'quoted' words",
    "a very long prompt " + "about many different things, " * 30,
]
NETWORK = NetworkConfig(resampler=mini.MINI_CONFIG.resampler, detail_tokens=3, semantic_tokens=2, cls_tokens=2)


@dataclasses.dataclass(frozen=True)
class Case:
    layout: str
    text_layers: tuple[int, int]
    full_vae: bool


CASES = {
    "SD1.5": Case("sd15_narrow", (12, 32), True),  # 16 cross-attentions; CLIP-L and VAE of full size
    "SDXL": Case("sdxl_narrow", (3, 4), False),  # 70 cross-attentions; short text encoders of full width, TAESD
}


@pytest.fixture(scope="module", params=list(CASES))
def both(request, tmp_path_factory):
    """One file of each family: in ComfyUI, and as the trainer's base."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("models")
    path = folder / "base.ckpt"
    mini_checkpoints.make_base(path, case.layout, text_layers=case.text_layers, full_vae=case.full_vae)
    mini.make_mini_encoders(folder / files.ENCODER_FOLDER)
    sizes = {name: {"num_hidden_layers": layers} for name, layers in zip(("l", "g"), case.text_layers)}
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(
        str(path), te_model_options={f"clip_{name}_model_config": words for name, words in sizes.items()}
    )[:3]
    encoders = [folder / files.ENCODER_FOLDER / name for name in (mini.MINI_CLIP_FILE, mini.MINI_DINO_FILE)]
    base = sd.SDBase.load(path, *encoders)
    assert base.name == request.param
    return SimpleNamespace(name=request.param, folder=folder, model=model, clip=clip, vae=vae, base=base)


@pytest.fixture
def model_folders(both, monkeypatch):
    table = dict(folder_paths.folder_names_and_paths)
    for name in (*files.ADAPTER_FOLDERS, files.ENCODER_FOLDER):
        (both.folder / name).mkdir(exist_ok=True)
        table[name] = ([str(both.folder / name)], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "temp_directory", str(both.folder))
    return both.folder


def first_chunk(clip, prompt: str):
    """ComfyUI's conditioning, of a long prompt the first 77 tokens; literally, without weights for words in brackets."""
    tokens = clip.tokenize(prompt)
    return clip.encode_from_tokens_scheduled({name: chunks[:1] for name, chunks in tokens.items()})


def pictures(seed: int, *shape: int) -> torch.Tensor:
    """(b, 3, h, w) in -1..1, smooth as pictures are"""
    g = tiny.generator(seed)
    small = torch.rand(shape[0], 3, 5, 5, generator=g) * 2 - 1
    return torch.nn.functional.interpolate(small, size=shape[1:], mode="bicubic", antialias=True).clamp(-1, 1)


def test_texts_are_encoded_alike(both):
    got = both.base.encode_text([tuple(prompt.split(sd.JOIN)) for prompt in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        tokens, extra = first_chunk(both.clip, prompt)[0]
        assert tiny.relative_error(got.tokens[row], tokens[0]) < TOLERANCE, prompt
        if both.name == "SDXL":
            assert tiny.relative_error(got.pooled[row], extra["pooled_output"][0]) < TOLERANCE, prompt
    assert (got.pooled is None) == (both.name == "SD1.5")
    assert torch.equal(both.base.empty_text().tokens[0], got.tokens[0])
    assert (got.tokens[1] - got.tokens[2]).abs().max() > 0.1


def test_pictures_become_the_same_latents_and_back(both):
    seen = pictures(1, 2, 32, 48)
    latents = both.base.to_latents(seen)
    theirs = both.model.model.process_latent_in(both.vae.encode((seen.movedim(1, -1) + 1) / 2))
    assert latents.shape == theirs.shape == (2, 4, 4, 6)
    assert tiny.relative_error(latents, theirs) < TOLERANCE
    drawn = tiny.noise_for(2, 4, 6)
    back = both.vae.decode(both.model.model.process_latent_out(drawn)).movedim(-1, 1) * 2 - 1
    assert tiny.relative_error(both.base.to_pictures(drawn), back) < TOLERANCE
    assert (back[0] - back[1]).abs().max() > 0.05


def caught_in_comfyui(model, positive, negative, size: int) -> SimpleNamespace:
    """The UNet's inputs and output in one step of sampling."""
    caught = SimpleNamespace()

    def spy(executor, x, timesteps, context, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        caught.x, caught.t, caught.chunks = x.clone(), timesteps.clone(), transformer_options["cond_or_uncond"]
        caught.output = executor(x, timesteps, context, y, control, transformer_options, **kwargs).clone()
        return caught.output

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", spy)
    tiny.ksample(model, positive, negative, steps=1, noise=tiny.noise_for(1, size // 8, size // 8))
    assert sorted(caught.chunks) == [0, 1]
    return caught


def random_network(base: sd.SDBase, mode: str) -> FlexIPNetwork:
    network = FlexIPNetwork(make_network(TrainConfig(1, 1, 0, "", network=NETWORK, start="random"), base).cfg)
    network = FlexIPNetwork(dataclasses.replace(network.cfg, gate_mode=mode))
    g = tiny.generator(3)
    with torch.no_grad():
        for p in network.parameters():
            spread = 0.7 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.5
            p.copy_(torch.randn(p.shape, generator=g) * spread + 0.5 * (p.dim() == 1))
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("mode", ["outputs", "tokens"])
def test_the_same_adapters_give_the_same_output_through_the_real_nodes(both, model_folders, mode):
    """Prompt, reference picture, adapters file and base file on both sides; nothing but the noise is handed over."""
    base, size, gate, strength = both.base, 64, 0.3, 0.8
    network = random_network(base, mode)
    save_checkpoint(network, model_folders / "flexip" / "adapters.safetensors")
    reference = pictures(5, 1, 100, 160)

    adapters = LoadFlexIPAdapters.execute("adapters.safetensors", "auto", "auto", "auto").args[0]
    encoded = EncodeReference.execute([adapters], [(reference.movedim(1, -1) + 1) / 2], ["center"]).args[0]
    gated = ApplyFlexIPGate.execute(both.model, adapters, encoded, gate, strength, 0.0, 1.0).args[0]
    conditions = [first_chunk(both.clip, prompt) for prompt in PROMPTS[1:3]]
    bare, ours = (caught_in_comfyui(model, *conditions, size) for model in (both.model, gated))

    features = base.features(reference)
    for name, value in features.items():
        assert tiny.relative_error(value, encoded.features[name]) < TOLERANCE
    null = {name: torch.zeros_like(value) for name, value in features.items()}
    rows = {name: torch.cat([(features, null)[chunk][name] for chunk in ours.chunks]) for name in features}
    text = base.encode_text([tuple(PROMPTS[1 + chunk].split(sd.JOIN)) for chunk in ours.chunks])
    branches = integration.branches(network, rows, text.tokens, (gate,), (strength,))
    with torch.no_grad(), integration.gated(base.unet, branches):
        output = base.unet(
            ours.x,
            ours.t,
            encoder_hidden_states=text.tokens,
            added_cond_kwargs=base.added_conditions(text, ours.x),
        ).sample
    assert len(network.block_widths) == {"SD1.5": 16, "SDXL": 70}[both.name]
    assert torch.equal(bare.x, ours.x)
    assert tiny.relative_error(output, ours.output) < TOLERANCE
    assert tiny.relative_error(bare.output, ours.output) > 100 * TOLERANCE


def test_the_noise_schedule_is_comfyuis(both):
    sigmas = both.model.get_model_object("model_sampling").sigmas
    a = both.base.alphas_cumprod
    torch.testing.assert_close(((1 - a) / a).sqrt(), sigmas, rtol=1e-4, atol=0)
