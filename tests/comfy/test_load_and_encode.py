"""LoadFlexIPAdapters and EncodeReference: files found by content, encoders from files or from wired CLIP_VISION objects."""

import copy
import dataclasses
import json
import os
import tempfile
from pathlib import Path

import comfy.clip_vision
import comfy.model_management as mm
import folder_paths
import pytest
import torch
from flexip_pack.flexip_core.encoders import towers
from flexip_pack.flexip_core.files.checkpoint import save_checkpoint
from flexip_pack.flexip_core.network.adapters import FlexIPNetwork
from flexip_pack.flexip_core.network.config import ClipConfig, DinoConfig
from flexip_pack.flexip_core.untrained import mini
from flexip_pack.nodes import files
from flexip_pack.nodes.encode import EncodeReference
from flexip_pack.nodes.load import LoadFlexIPAdapters
from safetensors.torch import load_file, save_file

CORE_CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_channels=3,
    image_size=56,
    patch_size=14,
    projection_dim=24,
    hidden_act="gelu",
)
CORE_DINO = dict(
    model_type="dinov2",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_channels=3,
    image_size=518,
    patch_size=14,
    layer_norm_eps=1e-6,
    use_swiglu_ffn=False,
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
)
CLIP = ClipConfig("tiny clip", 24, dict(width=32, layers=3, head_width=16, patch_size=14, image_size=56))
DINO = DinoConfig("vit_small_patch14_dinov2", 32, 518, dict(embed_dim=32, depth=2, num_heads=2))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Empty model folders of our own."""
    table = dict(folder_paths.folder_names_and_paths)
    for name in (*files.ADAPTER_FOLDERS, files.ENCODER_FOLDER):
        (tmp_path / name).mkdir()
        table[name] = ([str(tmp_path / name)], {".safetensors", ".pt", ".bin"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return tmp_path


def adapters_file(models, name="adapters.safetensors", **changes):
    cfg = dataclasses.replace(mini.MINI_CONFIG, **{"clip": CLIP, "dino": DINO, **changes})
    torch.manual_seed(0)
    path = models / "flexip" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(FlexIPNetwork(cfg), path)
    return name


def core_vision(config):
    """Older cores take a file only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config))
        return comfy.clip_vision.ClipVisionModel(str(path))


@torch.no_grad()
def core_encoder(config, seed):
    model = core_vision(config)
    g = torch.Generator().manual_seed(seed)
    for p in model.model.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * 0.3 + (p.ndim == 1) * 0.5)
    return model


def load(preservation="adapters.safetensors", personalization="auto", clip_vision="auto", dino="auto"):
    return LoadFlexIPAdapters.execute(preservation, personalization, clip_vision, dino).args[0]


def encode(adapters, images, crop="center", mask=None, clip=None, dino=None):
    wrap = lambda value: None if value is None else [value]
    return EncodeReference.execute(
        [adapters], images if isinstance(images, list) else [images], [crop], wrap(mask), wrap(clip), wrap(dino)
    )


def picture(seed=0, height=40, width=60, batch=1, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [518, 224])
def test_wired_core_encoders_give_what_their_files_give(models, size):
    """Native size: core's own forward; another size: its weights by the checkpoint's rule. Nothing of the object changes."""
    adapters_file(models, dino=dataclasses.replace(DINO, image_size=size))
    clip, dino = core_encoder(CORE_CLIP, 1), core_encoder(CORE_DINO, 2)
    for name, core in (("a.safetensors", clip), ("nested/b.safetensors", dino)):
        path = models / files.ENCODER_FOLDER / name
        path.parent.mkdir(exist_ok=True)
        save_file({key: value.clone().contiguous() for key, value in core.get_sd().items()}, path)
    before = {key: value.clone() for core in (clip, dino) for key, value in core.get_sd().items()}
    from_files = encode(load(), picture()).args[0]
    wired = encode(load(), picture(), clip=clip, dino=dino).args[0]
    assert from_files.features["cls"].shape == (1, 24) and from_files.features["patches"].shape == (
        1,
        (size // 14) ** 2,
        32,
    )
    for name, value in from_files.features.items():
        assert value.std() > 0.05
        torch.testing.assert_close(wired.features[name], value, atol=1e-4, rtol=1e-4)
    after = {key: value for core in (clip, dino) for key, value in core.get_sd().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert clip.image_size == 56 and dino.image_size == 518


@pytest.fixture
def mini_models(models):
    mini.make_mini_encoders(models / files.ENCODER_FOLDER)
    mini.make_mini_flexip(models / "flexip" / mini.MINI_FLEXIP)
    return models


def test_names_and_folders_of_encoder_files_mean_nothing(mini_models):
    expected = encode(load(mini.MINI_FLEXIP), picture()).args[0]
    encoders = mini_models / files.ENCODER_FOLDER
    (encoders / "deep" / "er").mkdir(parents=True)
    (encoders / mini.MINI_CLIP_FILE).rename(encoders / "deep" / "dino.safetensors")
    (encoders / mini.MINI_DINO_FILE).rename(encoders / "deep" / "er" / "clip.safetensors")
    (encoders / "page.safetensors").write_text("<!DOCTYPE html><html>")
    save_file({"x": torch.zeros(2)}, encoders / "aaa.safetensors")
    folder_paths.filename_list_cache.clear()
    got = encode(load(mini.MINI_FLEXIP), picture()).args[0]
    for name, value in expected.features.items():
        assert torch.equal(got.features[name], value)


def test_pictures_of_different_sizes_are_one_reference(mini_models):
    adapters = load(mini.MINI_FLEXIP)
    batch, tall, grey, clear = (
        picture(1, batch=2),
        picture(2, 90, 30),
        picture(3, 33, 33, channels=1),
        picture(4, channels=4),
    )
    result = encode(adapters, [batch, tall, grey, clear])
    reference = result.args[0]
    assert reference.count == 5 and reference.features["cls"].shape[0] == reference.features["patches"].shape[0] == 5
    assert all(
        not value.any() and value.shape == reference.features[name].shape for name, value in reference.null.items()
    )
    alone = encode(adapters, tall).args[0]
    torch.testing.assert_close(reference.features["cls"][2], alone.features["cls"][0], atol=1e-5, rtol=1e-5)


def test_the_preview_is_what_the_encoder_saw(mini_models):
    from PIL import Image

    result = encode(load(mini.MINI_FLEXIP), picture(5, 60, 30), "pad")
    saved = result.ui.values[0]
    shown = Image.open(mini_models / saved["filename"])
    assert shown.size == (224, 224)
    assert all(abs(channel - 128) < 3 for channel in shown.getpixel((5, 112))), (
        "pad has borders at the sides of a tall picture"
    )
    assert result.args[0].features["patches"].shape[1] == 256


def test_the_preview_is_of_the_encoder_that_sees_most(mini_models):
    from PIL import Image

    for name, size in (("dino.safetensors", 280), ("clip.safetensors", 112)):
        dino = dataclasses.replace(mini.MINI_DINO, image_size=size)
        adapters_file(mini_models, name, clip=mini.MINI_CLIP, dino=dino)
        result = encode(load(name), picture(batch=2))
        shown = [Image.open(mini_models / saved["filename"]).size for saved in result.ui.values]
        assert shown == [(max(size, 224),) * 2] * 2


def test_each_picture_is_cut_by_its_own_mask(mini_models):
    """Masks come as one batch or as a list; where there are fewer than pictures they repeat."""
    adapters, scenes = load(mini.MINI_FLEXIP), picture(6, 80, 120, batch=3)
    masks = torch.zeros(2, 80, 120)
    masks[0, 5:25, 5:25] = 1
    masks[1, 50:75, 80:115] = 1
    alone = [encode(adapters, scenes[i : i + 1], "subject", masks[i % 2][None]).args[0] for i in range(3)]
    wrong = encode(adapters, scenes[1:2], "subject", masks[:1]).args[0]
    assert (wrong.features["cls"] - alone[1].features["cls"]).abs().max() > 1e-3
    for given in ([masks], [masks[:1], masks[1:]]):
        together = EncodeReference.execute([adapters], [scenes], ["subject"], given).args[0]
        for name, value in together.features.items():
            expected = torch.cat([reference.features[name] for reference in alone])
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_the_subject_is_cut_out_by_a_mask_or_by_alpha(mini_models):
    adapters = load(mini.MINI_FLEXIP)
    scene = picture(6, 80, 120)
    mask = torch.zeros(1, 80, 120)
    mask[:, 20:50, 70:110] = 1
    masked = encode(adapters, scene, "subject", mask).args[0].features["cls"]
    assert (masked - encode(adapters, scene).args[0].features["cls"]).abs().max() > 1e-3
    other = scene.clone()
    other[:, :, :30] = 0  # far from the subject
    torch.testing.assert_close(encode(adapters, other, "subject", mask).args[0].features["cls"], masked)
    opaque = torch.cat([scene, torch.ones_like(scene[..., :1])], -1)
    with pytest.raises(ValueError, match="EncodeReference: .*mask"):
        encode(adapters, scene, "subject")
    assert encode(adapters, opaque, "subject").args[0].count == 1


@pytest.mark.parametrize(
    "image, words",
    [
        (torch.zeros(0, 8, 8, 3), "at least one picture"),
        (torch.full((1, 8, 8, 3), float("nan")), "EncodeReference"),
        (torch.zeros(1, 8, 8, 5), "EncodeReference"),
        (torch.zeros(1, 0, 8, 3), "EncodeReference"),
    ],
)
def test_what_is_no_picture_is_a_sentence(mini_models, image, words):
    with pytest.raises(ValueError, match=words) as error:
        encode(load(mini.MINI_FLEXIP), image)
    assert "\n" not in str(error.value)


def test_a_wired_encoder_that_does_not_fit_is_a_sentence(mini_models):
    with pytest.raises(ValueError, match="EncodeReference: .*clip_vision socket.*32 wide.*64 wide"):
        encode(load(mini.MINI_FLEXIP), picture(), clip=core_encoder(CORE_CLIP, 1))


def test_a_second_file_beside_a_flexip_file_is_a_sentence(mini_models):
    adapters_file(mini_models, "second.safetensors")
    with pytest.raises(ValueError, match="LoadFlexIPAdapters: .*holds both adapters.*auto"):
        load(mini.MINI_FLEXIP, personalization="second.safetensors")


def test_paths_out_of_the_folder_are_refused(mini_models):
    secret = mini_models / "secret.safetensors"
    secret.write_bytes((mini_models / "flexip" / mini.MINI_FLEXIP).read_bytes())
    for name in ("../secret.safetensors", str(secret), "gone.safetensors", ""):
        with pytest.raises(ValueError, match="LoadFlexIPAdapters: there is no file"):
            load(name)


def test_adapters_and_encoders_are_under_comfyuis_memory_manager(mini_models):
    adapters = load(mini.MINI_FLEXIP)
    encode(adapters, picture())
    managed = {id(loaded.model.model) for loaded in mm.current_loaded_models if loaded.model is not None}
    assert {id(patcher.model) for patcher in adapters.towers.values()} <= managed and len(adapters.towers) == 2
    again = load(mini.MINI_FLEXIP)
    encode(again, picture())
    assert [id(p) for p in again.towers.values()] == [id(p) for p in adapters.towers.values()], (
        "one encoder file is held once"
    )


def test_an_interrupt_stops_the_encoding_of_many_pictures(mini_models, monkeypatch):
    """As by the Cancel button while the first of them are with the first encoder."""
    passes = []

    for tower in (towers.ClipTower, towers.DinoTower):

        def features(self, pixels, kinds, original=tower.features):
            passes.append(kinds)
            mm.interrupt_current_processing()
            return original(self, pixels, kinds)

        monkeypatch.setattr(tower, "features", features)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            encode(load(mini.MINI_FLEXIP), picture(batch=40))
    finally:
        mm.interrupt_current_processing(False)
    assert len(passes) == 1


def test_a_deep_copy_of_the_adapters_is_no_second_network(mini_models):
    adapters = load(mini.MINI_FLEXIP)
    assert copy.deepcopy({"in": ["a dict", adapters]})["in"][1] is adapters


@pytest.mark.parametrize(
    "role, folder, name",
    [
        ("preservation", "flexip", mini.MINI_FLEXIP),
        ("personalization", "ipadapter", "second.safetensors"),
        ("clip_vision", files.ENCODER_FOLDER, mini.MINI_CLIP_FILE),
        ("dino", files.ENCODER_FOLDER, mini.MINI_DINO_FILE),
    ],
)
def test_a_changed_file_is_loaded_again(mini_models, role, folder, name):
    save_file({"x": torch.zeros(2)}, mini_models / "ipadapter" / "second.safetensors")
    unchosen = dict(preservation=mini.MINI_FLEXIP, personalization="auto", clip_vision="auto", dino="auto")
    arguments = {**unchosen, role: name}
    before = LoadFlexIPAdapters.fingerprint_inputs(**arguments)
    assert LoadFlexIPAdapters.fingerprint_inputs(**arguments) == before
    os.utime(mini_models / folder / name, (1, 1))
    assert LoadFlexIPAdapters.fingerprint_inputs(**arguments) != before


def test_every_change_in_the_encoders_folder_encodes_again(mini_models):
    """ComfyUI keeps a reference as long as the fingerprint is the same. It passes None for whatever is wired, here in lists."""
    folder = mini_models / files.ENCODER_FOLDER
    seen = []

    def changed():
        got = EncodeReference.fingerprint_inputs(adapters=[None], image=[None], crop=["center"])
        assert got == EncodeReference.fingerprint_inputs(adapters=[None], image=[None], crop=["pad"])
        seen.append(got)
        return got not in seen[:-1]

    changed()
    os.utime(folder / mini.MINI_CLIP_FILE, (1, 1))
    assert changed(), "a file was replaced"
    time = os.stat(folder / mini.MINI_DINO_FILE).st_mtime_ns
    with (folder / mini.MINI_DINO_FILE).open("ab") as file:
        file.write(b" ")
    os.utime(folder / mini.MINI_DINO_FILE, ns=(time, time))
    assert changed(), "a file was replaced by one of the same age"
    (folder / "a" / "b").mkdir(parents=True)
    save_file({"x": torch.zeros(2)}, folder / "a" / "b" / "aaa.safetensors")
    folder_paths.filename_list_cache.clear()
    assert changed(), "a file was added"


def test_a_broken_encoders_folder_is_no_error_before_the_node_runs(mini_models):
    folder = mini_models / files.ENCODER_FOLDER
    expected = files.state_of(files.ENCODER_FOLDER)
    assert [name for name, *_ in expected] == sorted([mini.MINI_CLIP_FILE, mini.MINI_DINO_FILE])
    if os.name == "posix":
        os.symlink(mini_models / "gone", folder / "broken.safetensors")
        folder_paths.filename_list_cache.clear()
        assert "broken.safetensors" in files.names(files.ENCODER_FOLDER)
        assert files.state_of(files.ENCODER_FOLDER) == expected
    folder.rename(mini_models / "elsewhere")
    assert files.state_of(files.ENCODER_FOLDER) == []


def test_loading_keeps_the_files_precision(mini_models):
    dtypes = {p.dtype for p in load(mini.MINI_FLEXIP).network.parameters()}
    assert (
        dtypes
        == {value.dtype for value in load_file(mini_models / "flexip" / mini.MINI_FLEXIP).values()}
        == {torch.float16}
    )


def test_an_encoder_put_into_the_folder_after_the_error_is_found(mini_models):
    """LoadFlexIPAdapters stays cached between the two tries."""
    file = mini_models / files.ENCODER_FOLDER / mini.MINI_CLIP_FILE
    away = file.rename(mini_models / "away.safetensors")
    folder_paths.filename_list_cache.clear()
    adapters = load(mini.MINI_FLEXIP)
    with pytest.raises(ValueError, match="EncodeReference: these adapters want CLIP"):
        encode(adapters, picture())
    away.rename(file.with_name("other name.safetensors"))
    folder_paths.filename_list_cache.clear()
    assert encode(adapters, picture()).args[0].count == 1


def test_a_wired_file_name_does_not_reload_at_every_run(mini_models):
    arguments = dict(preservation=None, personalization="auto", clip_vision=None, dino="auto")
    assert (
        LoadFlexIPAdapters.fingerprint_inputs(**arguments) == LoadFlexIPAdapters.fingerprint_inputs(**arguments) == []
    )


@pytest.mark.parametrize("shape", [(80, 120), (1, 80, 120), (1, 1, 80, 120), (1, 80, 120, 1)])
def test_a_mask_may_have_any_of_comfyuis_shapes(mini_models, shape):
    mask = torch.zeros(80, 120)
    mask[20:50, 70:110] = 1
    adapters = load(mini.MINI_FLEXIP)
    expected = encode(adapters, picture(6, 80, 120), "subject", mask[None]).args[0].features["cls"]
    assert torch.equal(
        encode(adapters, picture(6, 80, 120), "subject", mask.reshape(shape)).args[0].features["cls"], expected
    )


def test_a_reference_of_another_encoder_with_the_same_widths_is_refused(mini_models):
    from flexip_pack.nodes.apply import check_reference

    adapters_file(
        mini_models, "bigger.safetensors", clip=mini.MINI_CLIP, dino=dataclasses.replace(mini.MINI_DINO, image_size=280)
    )
    reference = encode(load(mini.MINI_FLEXIP), picture()).args[0]
    check_reference(load(mini.MINI_FLEXIP), reference)
    with pytest.raises(
        ValueError,
        match="ApplyFlexIPGate: .*other adapters.*Wire bigger.safetensors.*Needed: .*280 px.*given: .*224 px",
    ):
        check_reference(load("bigger.safetensors"), reference)


def test_extra_model_paths_yaml_adds_folders_for_adapters_and_encoders(mini_models, monkeypatch, tmp_path_factory):
    """As main.py does it: the YAML is read before the pack is imported, and leaves the file types of our folders open."""
    from utils.extra_config import load_extra_path_config

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for folder, file in (
        ("flexip", mini.MINI_FLEXIP),
        ("clip_vision", mini.MINI_CLIP_FILE),
        ("clip_vision", mini.MINI_DINO_FILE),
    ):
        target = elsewhere / "my" / folder / "deep" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        (mini_models / folder / file).rename(target)
    (elsewhere / "my" / "ipadapter").mkdir()
    (elsewhere / "my" / "ipadapter" / "notes.txt").write_text("no weights")
    table = {"clip_vision": folder_paths.folder_names_and_paths["clip_vision"]}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "models_dir", str(mini_models))
    yaml = elsewhere / "extra.yaml"
    yaml.write_text(
        f"mine:\n  base_path: {elsewhere}\n  flexip: my/flexip\n  ipadapter: my/ipadapter\n  clip_vision: my/clip_vision\n"
    )
    load_extra_path_config(str(yaml))
    files.register_folders()
    folder_paths.filename_list_cache.clear()
    assert files.adapter_names() == [os.path.join("deep", mini.MINI_FLEXIP)]
    assert encode(load(os.path.join("deep", mini.MINI_FLEXIP)), picture()).args[0].count == 1
