"""The real base: what is told from a checkpoint's shapes, what is refused, how text is tokenised, and training on it."""

import json
import shutil
from types import SimpleNamespace

import public_layouts as public
import pytest
import tiny_base
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from flexip_core.files.checkpoint import load_checkpoint, save_checkpoint
from flexip_core.files.weights import read_header, read_tensors
from flexip_core.integrations.diffusers import attention_names, encode_references, gated, guided
from flexip_core.network.config import DinoConfig
from flexip_core.training import cache, image_encoders, sd, stores
from flexip_core.training import dataset as data_folder
from flexip_core.training.base import Text
from flexip_core.training.config import NetworkConfig, OptimizerConfig, TrainConfig
from flexip_core.training.entries import file_identity
from flexip_core.training.image_encoders import choose, encoder_in
from flexip_core.training.loop import Trainer
from flexip_core.training.probe import GATES
from flexip_core.training.sampling import draw
from flexip_core.training.sd_configs import prediction, read_checkpoint
from flexip_core.training.start import make_network
from flexip_core.untrained import mini, mini_checkpoints

NETWORK = NetworkConfig(resampler=mini.MINI_CONFIG.resampler, detail_tokens=3, semantic_tokens=2, cls_tokens=2)
UNET = "model.diffusion_model."


def config(folder, **changes) -> TrainConfig:
    settings = dict(
        steps=2, batch=2, seed=1, folder=str(folder), network=NETWORK, optimizer=OptimizerConfig(lr=1e-3, warmup=0)
    )
    return TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_base.make_files(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def base(files):
    return sd.SDBase.load(**files)


@pytest.fixture(scope="module", params=["SD1.5", "SDXL"])
def each(request, tmp_path_factory):
    """A base of each family, and the folder and names of its files."""
    folder = tmp_path_factory.mktemp("each")
    names = tiny_base.make_files(folder, request.param)
    return sd.SDBase.load(**names), folder, names


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two subjects with two views, two loose pictures, and a subject for the probe."""
    folder = tmp_path_factory.mktemp("dataset")
    shown = ["variant/dog/1", "variant/dog/2", "variant/cup/1", "variant/cup/2", "invariant/sea", "invariant/hill"]
    for number, name in enumerate([*shown, "val/variant/cat/1", "val/variant/cat/2"]):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (tiny_base.pictures(number, 1, 80)[0].movedim(0, -1) * 127.5 + 127.5).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"a photo of thing {number}, on a table")
    return folder


# --- what a file is


@pytest.mark.parametrize(
    "role, other, sentence",
    [
        (
            "dino",
            "clip_vision",
            "dino: .*mini_clip.* is CLIP .*, not a DINO, but training needs a DINOv2 image encoder",
        ),
        ("clip_vision", "dino", "clip_vision: .*mini_dino.* is DINOv2 .*, but training needs a CLIP ViT image encoder"),
        ("dino", "checkpoint", "dino: base.ckpt .* is no image encoder that FlexIP knows, .*training needs a DINOv2"),
    ],
)
def test_an_encoder_of_the_wrong_kind_is_told_with_what_training_needs(files, role, other, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        encoder_in(role, files[other])
    assert "scores" not in str(error.value) and "facebookresearch/dino" not in str(error.value)
    with pytest.raises(ValueError, match=sentence):
        sd.SDBase.load(**{**files, role: files[other]})


def test_half_an_encoder_is_told_before_the_training_begins(files, tmp_path):
    tensors = load_file(files["dino"])
    tensors.pop("blocks.0.norm2.bias")
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"dino: half.safetensors .*lacks 1 tensors .*training needs a DINOv2"):
        encoder_in("dino", tmp_path / "half.safetensors")


def test_an_encoder_is_found_by_its_contents(files, tmp_path):
    (tmp_path / "broken.safetensors").write_text("<!DOCTYPE html>")
    paths = {"broken": str(tmp_path / "broken.safetensors"), "z": files["clip_vision"], "a": files["dino"]}
    assert [choose(role, paths, "models") for role in ("clip_vision", "dino")] == [paths["z"], paths["a"]]
    paths.pop("a")
    with pytest.raises(ValueError, match=r"dino: no file in models is a DINOv2.* broken \(unreadable\), z \(CLIP"):
        choose("dino", paths, "models")
    with pytest.raises(ValueError, match="Looked at: no files at all"):
        choose("dino", {}, "models")


def test_of_several_encoders_the_one_that_flexip_reads_by_default_is_taken_else_the_largest(monkeypatch):
    """ViT-g is larger than ViT-L/14, which FlexIP reads."""

    def shape(width, depth):
        return SimpleNamespace(shape=SimpleNamespace(width=width, depth=depth))

    towers = {"small": shape(384, 12), "default": shape(1024, 24), "giant": shape(1536, 40)}
    monkeypatch.setattr(image_encoders, "read_header", lambda path: path)
    monkeypatch.setattr(image_encoders, "identify", towers.get)
    monkeypatch.setattr(image_encoders, "encoder_in", lambda role, path: DinoConfig() if path == "default" else path)
    paths = {name: name for name in towers}
    assert choose("dino", paths, "models") == "default"
    paths.pop("default")
    assert choose("dino", paths, "models") == "giant"


@pytest.mark.parametrize("layout, config", [("sd15_full", public.SD15), ("sdxl_full", public.SDXL)])
def test_the_published_unets_are_told_from_shapes_alone(tmp_path, layout, config):
    mini_checkpoints.make_base(tmp_path / "any name.ckpt", layout, full_vae=True)
    found = read_checkpoint(tmp_path / "any name.ckpt")
    ours, theirs = (public.unet_on_meta(words) for words in (found.unet, config))
    shapes = [{key: value.shape for key, value in unet.state_dict().items()} for unet in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for name in attention_names(theirs).values():
        assert ours.get_submodule(name).heads == theirs.get_submodule(name).heads
    assert found.latent_scale == {"sd15_full": 0.18215, "sdxl_full": 0.13025}[layout]
    assert found.vae["block_out_channels"] == (128, 256, 512, 512) and found.vae["layers_per_block"] == 2
    sizes = [
        (t.config["hidden_size"], t.config["num_hidden_layers"], t.config["num_attention_heads"]) for t in found.texts
    ]
    assert sizes == [(768, 12, 12), (1280, 32, 20)][: len(sizes)]
    activations = [(text.config["hidden_act"], text.padding) for text in found.texts]
    assert activations == [("quick_gelu", 49407), ("gelu", 0)][: len(sizes)]


def changed(files, tmp_path, change):
    tensors = read_tensors(files["checkpoint"])
    change(tensors)
    torch.save({"state_dict": tensors}, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


def drop(prefix):
    def change(tensors):
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    return change


def shaped(key, *shape):
    return lambda tensors: tensors.__setitem__(key, torch.zeros(1).expand(shape))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (shaped(f"{UNET}input_blocks.0.0.weight", 320, 9, 3, 3), "is an inpainting model"),
        (shaped(f"{UNET}input_blocks.0.0.weight", 320, 8, 3, 3), "8 input channels instead of 4"),
        (shaped("edm_vpred.sigma_max", 1), "has EDM's noise schedule"),
        (shaped("edm_mean", 4), "is a Playground model"),
        (shaped("cond_stage_model.model.ln_final.weight", 1024), "is a Stable Diffusion 2"),
        (drop("cond_stage_model."), "holds no text encoder"),
        (drop("first_stage_model."), "holds no VAE"),
        (drop(UNET), "is not a Stable Diffusion checkpoint in ComfyUI's layout"),
        (drop(f"{UNET}output_blocks.1.1.transformer_blocks."), "not laid out evenly"),
        (drop(f"{UNET}out.2."), "lacks the tensor 'model.diffusion_model.out.2.weight'"),
        (shaped("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", 9, 768), "is not CLIP's"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_a_sentence(files, tmp_path, change, sentence):
    path = changed(files, tmp_path, change)
    with pytest.raises(ValueError, match=rf"^changed.ckpt .*{sentence}[^.]*") as error:
        read_checkpoint(path)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_the_refiner_is_refused(tmp_path):
    names = tiny_base.make_files(tmp_path, "SDXL")

    def refiner(tensors):
        drop("conditioner.embedders.0.")(tensors)
        for key in [key for key in tensors if key.startswith("conditioner.embedders.1.")]:
            tensors[key.replace("embedders.1.", "embedders.0.")] = tensors.pop(key)

    with pytest.raises(ValueError, match="is the SDXL refiner"):
        read_checkpoint(changed(names, tmp_path, refiner))


@pytest.mark.parametrize(
    "keys, metadata, expected",
    [
        ((), {}, ("epsilon", False)),
        ((), {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
        ((), {"modelspec.prediction_type": "v"}, ("v", False)),
        (("v_pred",), {}, ("v", False)),
        (("v_pred", "ztsnr"), {}, ("v", True)),
        (("ztsnr",), {}, ("epsilon", False)),
    ],
)
def test_a_file_tells_what_it_predicts(tmp_path, keys, metadata, expected):
    save_file({"x": torch.zeros(1), **{key: torch.zeros(0) for key in keys}}, tmp_path / "v.safetensors", metadata)
    assert prediction(read_header(tmp_path / "v.safetensors")) == expected


def test_a_base_that_predicts_v_is_read_with_its_schedule_and_may_be_told(files, tmp_path):
    def marked(tensors):
        tensors.update(v_pred=torch.zeros(0), ztsnr=torch.zeros(0))

    path = changed(files, tmp_path, marked)
    about = read_checkpoint(path)
    assert (about.prediction, about.zero_snr) == ("v", True)
    base = sd.SDBase.load(**{**files, "checkpoint": path}, unet=False)
    assert base.prediction == "v" and base.alphas_cumprod[-1] < 1e-7 and base.alphas_cumprod[0] > 0.99
    assert (base.alphas_cumprod.diff() < 0).all()
    assert sd.SDBase.load(**files, unet=False, prediction="v").prediction == "v"
    with pytest.raises(ValueError, match='prediction must be "epsilon" or "v"'):
        sd.SDBase.load(**files, unet=False, prediction="x0")


def test_encoders_in_half_precision_compute_in_it_and_say_the_same(each):
    base, _, names = each
    half = sd.SDBase.load(**names, unet=False)
    half.dtype = torch.bfloat16
    pictures, captions = tiny_base.pictures(0, 2, 64), [("a dog", "on a beach"), ()]
    seen = set()

    def watched(module, inputs, out):
        seen.update(value.dtype for value in inputs if isinstance(value, torch.Tensor) and value.is_floating_point())

    for module in (half.clip_tower, half.dino_tower, *half.text_encoders):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(watched)
    whole = {**base.features(pictures), **base.encode_text(captions)._asdict()}
    found = {**half.features(pictures), **half.encode_text(captions)._asdict()}
    assert seen == {torch.bfloat16}, "no multiplication in float32"
    for name, value in whole.items():
        if value is not None:
            assert found[name].dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(found[name].flatten(), value.flatten(), dim=0) > 0.99
    assert next(half.vae.parameters()).dtype == torch.float32, "whose latents are what the loss is made of"


def test_pictures_are_encoded_together_where_there_is_room_with_the_same_flops(base, monkeypatch):
    pictures, sizes = tiny_base.pictures(0, 5, 64), []
    encode = base.vae.encode

    def counted(some):
        sizes.append(len(some))
        return encode(some)

    monkeypatch.setattr(base.vae, "encode", counted)
    found = []
    for at_once in (1, 2, 5):
        monkeypatch.setattr(base, "at_once", lambda pictures, at_once=at_once: at_once)
        with FlopCounterMode(display=False) as flops:
            found.append((base.to_latents(pictures), flops.get_total_flops()))
    assert sizes == [1] * 5 + [2, 2, 1] + [5]
    for latents, count in found[1:]:
        torch.testing.assert_close(latents, found[0][0], rtol=1e-4, atol=1e-5)
        assert count == found[0][1]
    monkeypatch.undo()
    assert base.at_once(pictures) == 1, "on a CPU there is nothing to win"
    monkeypatch.setattr(base, "device", torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**30, 80 * 2**30))
    assert base.at_once(torch.empty(64, 3, 512, 512, device="meta")) == 10
    assert base.at_once(torch.empty(4, 3, 1024, 1024, device="meta")) == 2
    assert base.at_once(torch.empty(4, 3, 8192, 8192, device="meta")) == 1


def test_sdxl_is_told_how_large_the_picture_was_and_where_it_was_cut(each):
    base, _, _ = each
    text = Text(torch.zeros(2, 77, 8), torch.zeros(2, 4) if base.name == "SDXL" else None)
    latents, sizes = torch.zeros(2, 4, 16, 16), torch.tensor([[600, 3000, 0, 52], [96, 128, 8, 0]])
    found = base.added_conditions(text, latents, sizes)
    if base.name == "SD1.5":
        assert found is None
    else:
        assert found["time_ids"].tolist() == [[600, 3000, 0, 52, 128, 128], [96, 128, 8, 0, 128, 128]]
        assert base.added_conditions(text, latents)["time_ids"].tolist() == [[128, 128, 0, 0, 128, 128]] * 2


def test_a_cache_is_filled_without_the_unet(files, dataset, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("the UNet was read")

    monkeypatch.setattr(sd, "load_unet", never)
    task = {
        "make": "flexip_core.training.sd:make",
        **files,
        "data": str(dataset),
        "size": 64,
        "cache": str(tmp_path / "c"),
    }
    sd.fill_cache(config(tmp_path, task=task))
    assert list((tmp_path / "c").glob("*.safetensors"))


@pytest.mark.parametrize("key", ["middle_block.1.norm.bias", "input_blocks.1.0.in_layers.2.weight"])
def test_a_checkpoint_with_a_missing_tensor_is_refused_and_none_stays_random(files, tmp_path, key):
    path = changed(files, tmp_path, lambda tensors: tensors.pop(f"{UNET}{key}"))
    with pytest.raises(ValueError, match="has a UNet that is not SD1.5's"):
        sd.load_unet(read_checkpoint(path))


def test_a_safetensors_file_with_old_text_encoder_names_is_read_alike(files, base, tmp_path):
    def old(tensors):
        start = "cond_stage_model.transformer."
        for key in [key for key in tensors if key.startswith(f"{start}text_model.")]:
            tensors[key.replace("text_model.", "")] = tensors.pop(key)
        tensors[f"{start}embeddings.position_ids"] = torch.arange(77)[None]

    tensors = read_tensors(files["checkpoint"])
    old(tensors)
    path = tmp_path / "old.safetensors"
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    other = sd.SDBase.load(**{**files, "checkpoint": path})
    text = base.encode_text([("a cat",)])
    assert torch.equal(other.encode_text([("a cat",)]).tokens, text.tokens)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        got, expected = (b.unet(x, t, encoder_hidden_states=text.tokens).sample for b in (other, base))
    assert torch.equal(got, expected)


# --- text


def test_padding_begins_after_the_end_and_exclamation_marks_stay(each):
    base, _, _ = each
    prompts = ["wow !~ a cat!", "", "many words " * 60]
    for text, padding in zip(base.checkpoint.texts, (49407, 0)):
        tokens = sd.token_numbers(text, prompts)
        assert tokens.shape == (3, 77) and (tokens[:, 0] == 49406).all()
        first = tokens[0].tolist()
        end = first.index(49407)
        assert first[end + 1 :] == [padding] * (76 - end)
        assert 0 in first[1:end]  # the "!" before "~"
        assert tokens[1].tolist() == [49406, 49407] + [padding] * 75
        assert tokens[2, -1] == 49407 and 49407 not in tokens[2, :-1]


def test_phrases_are_joined_and_dropped_ones_leave_no_trace(base):
    got = base.encode_text([("a cat", "", "on a mat"), ("a cat, on a mat",)]).tokens
    assert torch.equal(got[0], got[1])
    with pytest.raises(ValueError, match="gives numbers of words"):
        base.encode_text(torch.zeros(1, 2, dtype=torch.long))


def test_sdxl_gets_pooled_text_and_the_size_of_the_picture(each):
    base, _, _ = each
    text = base.encode_text([("a cat",), ()])
    added = base.added_conditions(text, torch.zeros(2, 4, 8, 6))
    if base.name == "SD1.5":
        assert text.pooled is None and added is None
        return
    assert torch.equal(added["text_embeds"], text.pooled) and text.pooled.shape == (2, 1280)
    assert added["time_ids"].tolist() == [[64, 48, 0, 0, 64, 48]] * 2
    dropped = text.replaced(torch.tensor([True, False]), base.empty_text())
    assert torch.allclose(dropped.pooled[0], text.pooled[1], atol=1e-5)
    assert torch.equal(dropped.pooled[1], text.pooled[1])


def test_texts_of_one_row_serve_many_and_keep_pooled_apart():
    one, two = Text(torch.zeros(1, 2, 3), torch.zeros(1, 4)), Text(torch.ones(2, 2, 3), torch.ones(2, 4))
    both = one.expand(2).followed_by(two)
    assert both.tokens[:, 0, 0].tolist() == both.pooled[:, 0].tolist() == [0, 0, 1, 1]
    assert Text(torch.zeros(1, 2, 3)).expand(2).pooled is None


# --- memory


def test_encoders_are_loaded_when_used_and_after_a_release_anew(files):
    base = sd.SDBase.load(**files)
    assert not any(name in base.__dict__ for name in sd._PARTS)
    seen = tiny_base.pictures(0, 1)
    before = base.to_latents(seen)
    assert "vae" in base.__dict__ and "text_encoders" not in base.__dict__
    base.release()
    assert "vae" not in base.__dict__
    assert torch.equal(base.to_latents(seen), before)


def test_bf16_holds_the_unet_in_half_the_memory_and_trains(files, dataset, tmp_path):
    cfg = config(tmp_path / "run", precision="bf16")
    task = sd.make("cpu", **files, data=str(dataset), size=64, run=cfg, probe_cases=0)
    sizes = {p.dtype for p in task.base.unet.parameters()}
    assert sizes == {torch.bfloat16}
    losses = {}
    for precision in ("fp32", "bf16"):
        if precision == "fp32":
            task.base.unet.float()  # the same rounded weights
        trainer = Trainer(config(tmp_path / precision, precision=precision), *task)
        losses[precision] = trainer.step().loss
        task.base.unet.bfloat16()
        assert all(p.dtype == torch.float32 and p.grad is not None for p in trainer.parameters.values())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


# --- training


def test_training_shows_pictures_and_scores_of_the_val_folder(files, dataset, tmp_path):
    cfg = config(tmp_path / "run", probe_every=1)
    task = sd.make("cpu", **files, data=str(dataset), size=64, run=cfg, probe_cases=2, probe_steps=1)
    assert all("thing 6" in c[0] or "thing 7" in c[0] for c in task.probe.cases.captions)
    trainer = Trainer(cfg, *task)
    frozen = {key: value.clone() for key, value in task.base.unet.state_dict().items()}
    assert trainer.run()
    probes = [
        line for line in map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()) if "probe" in line
    ]
    assert [line["step"] for line in probes] == [1, 2]
    scores = probes[-1]["probe"]
    assert scores == pytest.approx(task.probe(trainer.average, 2)), "the same weights, the same numbers"
    assert set(scores) == {"score", *(f"{name}_{gate:g}" for name in ("identity", "copied", "text") for gate in GATES)}
    assert scores["score"] == pytest.approx(scores["identity_1"] + scores["text_0"])
    for step in (1, 2):
        sheet = Image.open(tmp_path / f"run/previews/step_00000{step}.png")
        assert sheet.width >= 4 * 64 and sheet.height >= 2 * 64
    assert all(torch.equal(value, frozen[key]) for key, value in task.base.unet.state_dict().items())
    assert load_checkpoint(tmp_path / "run/final.safetensors").cfg.base == "SD1.5"


@pytest.mark.parametrize("with_val", [True, False])
def test_the_data_are_scanned_once(files, dataset, tmp_path, monkeypatch, with_val):
    """The folder is walked once and each folder in it is looked through once, whatever probe and source need of it."""
    root = shutil.copytree(dataset, tmp_path / "data")
    if not with_val:
        shutil.rmtree(root / "val")
    walked, seen = [], []
    walk, views = stores.FolderStore.__init__, data_folder._views
    monkeypatch.setattr(stores.FolderStore, "__init__", lambda self, at: walked.append(at) or walk(self, at))
    monkeypatch.setattr(
        data_folder, "_views", lambda store, folder, *a: seen.append(folder) or views(store, folder, *a)
    )
    task = sd.make("cpu", **files, data=str(root), size=64, probe_cases=1, probe_steps=1)
    assert len(walked) == 1 and len(seen) == len(set(seen))
    assert any(folder.startswith("val/") for folder in seen) == with_val
    assert task.source.pictures() == 2 and len(task.probe.cases.captions) == 1


def test_a_clip_without_text_tower_scores_that_gate_0_does_not_copy(files, dataset, tmp_path):
    alone = {key: value for key, value in load_file(files["clip_vision"]).items() if key.startswith("visual.")}
    save_file(alone, tmp_path / "vision.safetensors")
    names = {**files, "clip_vision": str(tmp_path / "vision.safetensors")}
    task = sd.make("cpu", **names, data=str(dataset), size=64, probe_cases=1, probe_steps=1)
    scores = task.probe(make_network(config(tmp_path), task.base), 0)
    assert "text_0" not in scores
    assert scores["score"] == pytest.approx(scores["identity_1"] - scores["copied_0"])


def test_a_picture_is_as_its_reference_to_the_probe_and_another_is_not(base):
    seen = base.seen(tiny_base.pictures(0, 1))
    other = base.seen(tiny_base.pictures(1, 1))
    for name in ("dino", "patches", "cls"):
        assert not torch.allclose(seen[name], other[name])
    assert torch.equal(seen["patches"], base.patches(tiny_base.pictures(0, 1)))


def test_with_a_cache_no_encoder_is_loaded_for_training(files, dataset, tmp_path):
    filler, kept = sd.SDBase.load(**files), str(tmp_path / "cache")
    identity = file_identity(*files.values(), kept)
    cache.fill(filler, str(dataset), 64, kept, identity, patches=True, drop_phrases=True)
    task = sd.make("cpu", **files, data=str(dataset), size=64, cache=kept, probe_cases=1, probe_steps=1)
    trainer = Trainer(config(tmp_path / "run"), *task)
    assert torch.isfinite(torch.tensor(trainer.step().loss))
    loaded = task.base.base.__dict__
    assert not any(name in loaded for name in sd._PARTS)
    trainer.probe(trainer.average, 1)
    assert not any(name in loaded for name in sd._PARTS), "the probe puts the encoders away"


# --- a diffusers pipeline


@torch.no_grad()
def test_five_lines_in_a_diffusers_pipeline_draw_what_the_trainer_draws(each, tmp_path):
    base, folder, names = each
    network = make_network(config(tmp_path, start="random"), base)
    save_checkpoint(network, tmp_path / "flexip.safetensors")
    picture = Image.effect_noise((90, 120), 80).convert("RGB")
    pipe, noise = tiny_base.pipeline(base, folder), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    settings = dict(num_inference_steps=1, guidance_scale=7.0, latents=noise, height=64, width=64, output_type="pt")

    # docs/training.md: begin
    network = load_checkpoint(tmp_path / "flexip.safetensors")
    features = encode_references(network, [picture], names["clip_vision"], names["dino"])
    text, no_text, *pooled = pipe.encode_prompt("a dog, on a beach", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="")  # fmt: skip
    with gated(pipe.unet, guided(network, features, text, no_text, gates=(0.7,))):
        # docs/training.md: end
        more = dict(zip(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), pooled))
        got = pipe(prompt_embeds=text, negative_prompt_embeds=no_text, **more, **settings).images

    expected = draw(base, [("a dog", "on a beach")], noise, network, features, 0.7, steps=1, cfg=7.0)
    bare = draw(base, [("a dog", "on a beach")], noise, steps=1, cfg=7.0)
    torch.testing.assert_close(got, (expected + 1) / 2, rtol=0, atol=1e-3)
    assert (expected - bare).abs().max() > 0.05
    if base.name == "SD1.5":  # the shorter form
        assert torch.equal(pipe.encode_prompt("a dog, on a beach", pipe.device, 1, True, "")[0], text)
    half = guided(network, features, text.bfloat16(), no_text.bfloat16(), gates=(0.7,))
    assert all(branch.k.dtype == torch.float32 for added in half.values() for branch in added)
