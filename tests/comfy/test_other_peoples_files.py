"""What people have in their model folders beside one whole file of each kind."""

from __future__ import annotations

import logging
import os
import sys

import folder_paths
import pytest
import torch
from flexip_pack.flexip_core.encoders import published
from flexip_pack.flexip_core.files.reference_file import SUFFIX, save_reference
from flexip_pack.nodes import files
from flexip_pack.nodes.load import LoadFlexIPAdapters
from flexip_pack.nodes.reference_files import reference_path
from safetensors.torch import save_file
from test_load_and_encode import (  # noqa: F401
    CORE_CLIP,
    CORE_DINO,
    adapters_file,
    core_encoder,
    encode,
    load,
    models,
    picture,
)
from test_reference_nodes import reference


@pytest.fixture
def world(models):
    """Adapters, a DINO, and what the CLIP's file would hold."""
    adapters_file(models)
    save(models, "dino.safetensors", core_encoder(CORE_DINO, 2).get_sd())
    return models


def save(folder, name: str, tensors: dict) -> str:
    path = folder / files.ENCODER_FOLDER / name
    path.parent.mkdir(exist_ok=True)
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    folder_paths.filename_list_cache.clear()
    return str(path)


def clip(seed: int = 1) -> dict:
    return dict(core_encoder(CORE_CLIP, seed).get_sd())


def features(**choices) -> torch.Tensor:
    return encode(load(**choices), picture()).args[0].features["cls"]


def test_with_several_that_fit_the_report_and_the_log_say_how_many_and_which(world, caplog):
    save(world, "b.safetensors", clip(1))
    only = encode(load(), picture()).args[0]
    assert "fit" not in only.encoders
    save(world, "a.safetensors", clip(2))
    with caplog.at_level(logging.INFO):
        two = encode(load(), picture()).args[0]
    assert "from a.safetensors (chosen from 2 that fit: a.safetensors, b.safetensors)" in two.encoders
    assert "a.safetensors, chosen from 2 that fit: a.safetensors, b.safetensors. Choose another" in caplog.text
    chosen = encode(load(clip_vision="b.safetensors"), picture()).args[0]
    assert chosen.encoders == only.encoders and torch.equal(chosen.features["cls"], only.features["cls"])
    assert not torch.equal(two.features["cls"], only.features["cls"])


def test_a_published_file_is_preferred_and_is_read_once(world, monkeypatch):
    save(world, "a.safetensors", clip(2))
    known = save(world, "b.safetensors", clip(1))
    expected = features(clip_vision="b.safetensors")
    with open(known, "rb") as file:
        monkeypatch.setattr(published, "_FILES", {os.path.getsize(known): published.sha256(file)})
    reads = []
    monkeypatch.setattr(published, "sha256", lambda file, own=published.sha256: reads.append(1) or own(file))
    published._digest.cache_clear()
    assert torch.equal(features(), expected) and torch.equal(features(), expected)
    assert len(reads) == 2, "each file of that size once"
    os.utime(known, (1, 1))
    features()
    assert len(reads) == 3, "a changed file again"
    monkeypatch.setattr(published, "_FILES", {os.path.getsize(known): "0" * 64})
    assert torch.equal(features(), features(clip_vision="a.safetensors")), "an unknown one costs the preference only"


def test_the_published_sizes_are_those_of_whole_files():
    assert all(len(digest) == 64 and size > 10**9 for size, digest in published._FILES.items())


def test_a_model_in_parts_is_one_file(world):
    tensors = clip()
    save(world, "whole.safetensors", tensors)
    expected = features()
    os.remove(world / files.ENCODER_FOLDER / "whole.safetensors")
    keys = list(tensors)
    names = [f"L/pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for name, part in zip(names, (keys[:20], keys[20:])):
        save(world, name, {key: tensors[key] for key in part})
    got = encode(load(), picture()).args[0]
    assert torch.equal(got.features["cls"], expected) and "that fit" not in got.encoders
    for name in names:
        assert torch.equal(features(clip_vision=name), expected)
    os.remove(world / files.ENCODER_FOLDER / names[1])
    folder_paths.filename_list_cache.clear()
    for attempt in (lambda: features(), lambda: load(clip_vision=names[0])):
        with pytest.raises(
            ValueError, match="is part 1 of 2 of a model, and pytorch_model-00002-of-00002.bin does not lie"
        ):
            attempt()


def test_scaled_float8_is_multiplied_out_and_what_is_not_says_why(world):
    tensors = clip()
    scaled, products = dict(tensors), dict(tensors)
    for key in [key for key in tensors if key.endswith("fc1.weight")]:
        scaled[key] = (tensors[key] / 0.01).to(torch.float8_e4m3fn)
        scaled[key.replace(".weight", ".scale_weight")] = torch.tensor(0.01)
        products[key] = scaled[key].float() * 0.01
    path = save(world, "scaled.safetensors", scaled)
    got = features()
    os.remove(path)
    save(world, "products.safetensors", products)
    assert torch.equal(got, features())
    os.remove(world / files.ENCODER_FOLDER / "products.safetensors")
    key = [key for key in tensors if key.endswith("fc1.weight")][-1]
    whole = {**tensors, key: tensors[key].to(torch.int8), key.replace(".weight", ".weight_scale"): torch.ones(128)}
    save(world, "int8.safetensors", whole)
    lacking = {name: value for name, value in tensors.items() if name != key}
    save(world, "pruned.safetensors", lacking)
    with pytest.raises(ValueError) as error:
        features()
    said = str(error.value)
    assert (
        "int8.safetensors is the right encoder but quantised" in said
        and "pruned.safetensors looks like the right encoder but lacks" in said
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows makes links for administrators only")
def test_a_link_that_leads_nowhere_says_so_and_stands_in_nobodys_way(world):
    save(world, "clip.safetensors", clip())
    os.symlink(world / "gone", world / files.ENCODER_FOLDER / "a link.safetensors")
    folder_paths.filename_list_cache.clear()
    assert features().shape == (1, 24)
    with pytest.raises(
        ValueError, match=r"'a link\.safetensors' in .* is a link that leads nowhere: '.*gone' is missing"
    ):
        load(clip_vision="a link.safetensors")


def test_names_saved_on_the_other_system_are_found(world, monkeypatch):
    adapters_file(world, "SD15/mini.safetensors")
    save(world, "L/clip.safetensors", clip())
    expected = features()
    monkeypatch.setattr(folder_paths, "input_directory", str(world))
    save_reference(reference(), world / "flexip" / f"a{SUFFIX}")
    for separator in "/\\":
        name, encoder = f"SD15{separator}mini.safetensors", f"L{separator}clip.safetensors"
        assert LoadFlexIPAdapters.validate_inputs(name, "auto", encoder, "auto") is True
        LoadFlexIPAdapters.fingerprint_inputs(name, "auto", encoder, "auto")
        assert torch.equal(encode(load(name, clip_vision=encoder), picture()).args[0].features["cls"], expected)
        assert reference_path(f"flexip{separator}a{SUFFIX}") == str(world / "flexip" / f"a{SUFFIX}")
