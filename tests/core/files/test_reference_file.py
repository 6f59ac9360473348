"""Saved references: the same bits come back, and whatever else a file holds is refused in one sentence that names it."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from networks import config
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from test_weights import Bomb, entry, raw_safetensors

from flexip_core.files import reference_file
from flexip_core.files.reference_file import (
    ENCODERS_KEY,
    FORMAT_KEY,
    NEEDS_KEY,
    SUFFIX,
    load_reference,
    save_reference,
)
from flexip_core.network.adapters import FlexIPNetwork
from flexip_core.network.config import ClipConfig, DinoConfig, FeatureNeed
from flexip_core.run.reference import Reference

CLIP = ClipConfig("mini clip", 6, {"width": 64, "layers": 2, "image_size": [224, 224]})
DINO = DinoConfig("vit_small_patch14_dinov2", 4, 56, {"embed_dim": 4, "init_values": 1.0})
FLEXIP = (FeatureNeed("cls", CLIP, "embedding", 6), FeatureNeed("patches", DINO, "patches", 4))
IP_ADAPTERS = (
    FeatureNeed("preservation", ClipConfig("ViT-H-14", 1024), "penultimate", 5, "zero pixels"),
    FeatureNeed("personalization", ClipConfig("ViT-bigG-14", 1280), "embedding", 7),
)


def reference(needs=FLEXIP, pictures: int = 2, tokens: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    shapes = {n.name: (pictures, n.width) if n.kind == "embedding" else (pictures, tokens, n.width) for n in needs}
    features = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    null = {name: torch.randn(shape[1:], generator=g).to(dtype).expand(shape) for name, shape in shapes.items()}
    return Reference(features, null, "mini clip from a.safetensors, mini dino from the dino socket", needs)


@pytest.fixture
def path(tmp_path):
    save_reference(reference(), tmp_path / f"anna{SUFFIX}")
    return tmp_path / f"anna{SUFFIX}"


def load_or_sentence(path: Path) -> Reference | str:
    """The reference, or the message of the only exception that may come; anything else fails the test."""
    try:
        return load_reference(path)
    except ValueError as error:
        text = str(error)
        assert path.name in text and text.endswith(".") and text.isprintable() and len(text) < 800, text
        return text


def refused(path: Path) -> str:
    outcome = load_or_sentence(path)
    assert isinstance(outcome, str), "the file was loaded"
    return outcome


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    view = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def assert_same(got: Reference, expected: Reference) -> None:
    assert got.needs == expected.needs and got.encoders == expected.encoders and got.count == expected.count
    for part in ("features", "null"):
        ours, theirs = getattr(got, part), getattr(expected, part)
        assert list(ours) == [need.name for need in expected.needs]
        assert all(same_bits(ours[name], value) for name, value in theirs.items())


@given(
    st.sampled_from([FLEXIP, IP_ADAPTERS, FLEXIP[:1]]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 9),
)
def test_a_round_trip_brings_back_every_bit(tmp_path_factory, needs, pictures, tokens, dtype, seed):
    saved = reference(needs, pictures, tokens, dtype, seed)
    path = tmp_path_factory.getbasetemp() / f"round trip{SUFFIX}"
    save_reference(saved, path)
    assert_same(load_reference(path), saved)


def test_signs_of_zero_and_the_smallest_numbers_survive(tmp_path):
    saved = reference()
    saved.features["cls"][0] = torch.tensor([-0.0, 0.0, 1e-45, -1e-40, 3.4e38, 1 / 3])
    save_reference(saved, tmp_path / "a")
    assert_same(load_reference(tmp_path / "a"), saved)


def test_the_file_holds_nothing_but_features_and_what_they_are_for(path):
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata.keys() == {FORMAT_KEY, NEEDS_KEY, ENCODERS_KEY} and metadata[FORMAT_KEY] == "1"
    assert names == {"0.features.cls", "0.features.patches", "0.null.cls", "0.null.patches"}
    assert str(path.parent).encode() not in path.read_bytes()
    assert json.loads(metadata[NEEDS_KEY])[1] == {
        "name": "patches",
        "encoder": {
            "type": "dino",
            "model": "vit_small_patch14_dinov2",
            "width": 4,
            "image_size": 56,
            "args": {"embed_dim": 4, "init_values": 1.0},
        },
        "kind": "patches",
        "width": 4,
        "null": "zeros",
    }


def test_what_networks_need_survives_json():
    for needs in (FlexIPNetwork(config()).needs(), FLEXIP, IP_ADAPTERS):
        for need in needs:
            assert FeatureNeed.from_dict(json.loads(json.dumps(need.to_dict()))) == need


def test_a_loaded_reference_does_not_hang_on_its_file(path):
    loaded = load_reference(path)
    before = {name: value.clone() for name, value in loaded.features.items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    path.unlink()
    assert all(torch.equal(loaded.features[name], value) for name, value in before.items())


def test_a_failed_save_leaves_the_old_file_and_no_part_of_the_new(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_reference(reference(seed=5), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_a_saved_file_is_as_readable_as_any_new_file(path):
    (path.parent / "plain").write_text("")
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def change(reference: Reference, **changes) -> Reference:
    fields = {name: getattr(reference, name) for name in ("features", "null", "encoders", "needs")}
    return Reference(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"needs": ()}, "does not list"),
        ({"needs": FLEXIP[:1]}, "0.features.patches"),
        ({"needs": (*FLEXIP, FLEXIP[0])}, "twice"),
        ({"null": {}}, "0.null.cls"),
        ({"features": {"cls": torch.full((2, 6), torch.nan), "patches": torch.ones(2, 3, 4)}}, "not numbers"),
        ({"features": {"cls": torch.ones(2, 6).double(), "patches": torch.ones(2, 3, 4)}}, "float64"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, changes, word):
    with pytest.raises(ValueError, match="cannot be saved.*" + word):
        save_reference(change(reference(), **changes), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_words_about_the_encoders_are_one_plain_line(tmp_path):
    save_reference(change(reference(), encoders="a\nb\x1b[31m\udcff  c" + "x" * 5000), tmp_path / "a")
    words = load_reference(tmp_path / "a").encoders
    assert words.startswith("a b [31m cxxx") and len(words) == 1000


def rewrite(path: Path, tensors=lambda t: t, metadata=lambda m: m) -> None:
    """Change a good file's tensors or metadata."""
    with safe_open(path, "pt") as file:
        meta = dict(file.metadata())
    # not load_file: it maps the file that is written here
    content = {key: value.clone() for key, value in load_file(path).items()}
    save_file(tensors(content), path, metadata=metadata(meta))


def meta(**values):
    """A change of the metadata; None takes a key away."""
    keys = {"format": FORMAT_KEY, "needs": NEEDS_KEY, "encoders": ENCODERS_KEY}
    return {
        "metadata": lambda m: {k: v for k, v in {**m, **{keys[n]: values[n] for n in values}}.items() if v is not None}
    }


def test_a_strangers_words_about_the_encoders_are_one_plain_line_too(path):
    rewrite(path, **meta(encoders="CLIP\r\nfrom\x00 here\x1b[2J\u2028now\t\u202egpj" + "x" * 5000))
    words = load_reference(path).encoders
    assert words.startswith("CLIP from here [2J now gpjxxx") and words.isprintable() and len(words) == 1000


def needs(change):
    """A change of the JSON in the metadata."""

    def edit(m):
        data = json.loads(m[NEEDS_KEY])
        return {**m, NEEDS_KEY: json.dumps(change(data) or data)}

    return {"metadata": edit}


def tensor(name, change):
    return {"tensors": lambda t: {**t, name: change(t[name])}}


def both(name, change):
    keys = (f"0.features.{name}", f"0.null.{name}")
    return {"tensors": lambda t: {**t, **{key: change(t[key]).clone() for key in keys}}}


FAULTS = {
    "no format": (meta(format=None), ["not a reference", "FlexIPSaveReference"]),
    "other version": (meta(format="2"), ["'2'", "'1'", "Update"]),
    "no needs": (meta(needs=None), ["no 'flexip.needs'"]),
    "no encoders": (meta(encoders=None), ["no 'flexip.encoders'"]),
    "empty needs": (meta(needs=""), ["not JSON"]),
    "broken json": (meta(needs="[{"), ["not JSON"]),
    "needs without end": (meta(needs="[" * 50_000), ["JSON"]),
    "needs nested deep": (meta(needs="[" * 50 + "]" * 50), ["nested"]),
    "long needs": (meta(needs="[" + " " * 200_000 + "]"), ["200002 characters"]),
    "needs of a number": (meta(needs="3"), ["does not list"]),
    "no entry": (meta(needs="[]"), ["does not list"]),
    "entry of text": (meta(needs='["cls"]'), ["flexip.needs[0] must be a table"]),
    "unknown field": (needs(lambda d: d[0].update(more=1)), ["unknown setting flexip.needs[0].more"]),
    "unknown fields of many lines": (needs(lambda d: d[0].update({"a\nb" * 900: 1})), ["unknown setting flexip.needs[0].a b"]),
    "missing field": (needs(lambda d: d[0].pop("width") and d), ["flexip.needs[0].width is missing"]),
    "unknown encoder field": (needs(lambda d: d[1]["encoder"].update(url="x")), ["flexip.needs[1].encoder", "url"]),
    "missing encoder field": (needs(lambda d: d[0].pop("encoder") and d), ["flexip.needs[0].encoder is missing"]),
    "encoder of text": (needs(lambda d: d[0].update(encoder="clip")), ["encoder must be a table"]),
    "unknown encoder type": (needs(lambda d: d[0]["encoder"].update(type="siglip")), ["clip, dino", "siglip"]),
    "no encoder type": (needs(lambda d: d[0]["encoder"].pop("type") and d), ["encoder.type", "None"]),
    "encoder type of list": (needs(lambda d: d[0]["encoder"].update(type=["clip"])), ["encoder.type"]),
    "unknown kind": (needs(lambda d: d[0].update(kind="pixels")), ["'pixels'", "embedding, penultimate, patches"]),
    "kind of the other encoder": (needs(lambda d: d[0].update(kind="patches")), ["'patches'", "mini clip"]),
    "unknown null": (needs(lambda d: d[0].update(null="ones")), ["'ones'", "zeros, zero pixels"]),
    "odd width": (needs(lambda d: d[0].update(width=6.0)), ["width", "6.0"]),
    "yes as width": (needs(lambda d: d[0].update(width=True)), ["width", "True"]),
    "another width": (needs(lambda d: d[0].update(width=8)), ["0.features.cls", "[2, 6]", "[pictures, 8]"]),
    "absurd width": (needs(lambda d: d[0].update(width=10**300)), ["0.features.cls"]),
    "name twice": (needs(lambda d: [d[0], d[0]]), ["twice"]),
    "name of two lines": (needs(lambda d: d[0].update(name="a\nb")), ["is not the name"]),
    "half a letter": (needs(lambda d: d[0]["encoder"].update(model="\ud800")), ["is not the name"]),
    "another name": (needs(lambda d: d[0].update(name="cli")), ["no tensor 0.features.cli"]),
    "missing tensor": ({"tensors": lambda t: {k: v for k, v in t.items() if k != "0.null.cls"}}, ["no tensor 0.null.cls"]),
    "extra tensor": ({"tensors": lambda t: {**t, "1.features.cls": torch.ones(2)}}, ["unknown tensor '1.features.cls'"]),
    "missing dimension": (tensor("0.features.patches", lambda v: v[0].clone()), ["0.features.patches", "[3, 4]"]),
    "no picture": (both("cls", lambda v: v[:0]), ["[0, 6]"]),
    "no tokens": (both("patches", lambda v: v[:, :0]), ["[2, 0, 4]"]),
    "null of another shape": (tensor("0.null.patches", lambda v: v[:, :1].clone()), ["0.null.patches", "[2, 1, 4]"]),
    "other picture numbers": (both("cls", lambda v: v[:1]), ["1 and 2 pictures"]),
    "whole numbers": (tensor("0.features.cls", lambda v: v.int()), ["int32", "float32, float16, bfloat16"]),
    "double": (tensor("0.null.cls", lambda v: v.double()), ["0.null.cls", "float64"]),
    "eight bits": (tensor("0.null.cls", lambda v: v.to(torch.float8_e4m3fn)), ["float8_e4m3fn"]),
    "nan": (tensor("0.features.cls", lambda v: v * torch.nan), ["0.features.cls", "not numbers"]),
    "infinite null": (tensor("0.null.patches", lambda v: v / 0), ["0.null.patches", "not numbers"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_gets_its_sentence(path, fault):
    edit, words = FAULTS[fault]
    rewrite(path, **edit)
    text = refused(path)
    assert all(word in text for word in words), text


FOREIGN = {
    "weights": (save({"a": torch.ones(2)}), ["not a reference"]),
    "flexip checkpoint": (save({"a": torch.ones(2)}, {"flexip.format": "1"}), ["not a reference"]),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["Git-LFS pointer"]),
    "page": (b"<!DOCTYPE html><html>", ["web page"]),
    "text": (b"hello, I am a readme", ["not a weight file"]),
    "nothing": (b"", ["empty"]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_gets_its_sentence(path, kind):
    content, words = FOREIGN[kind]
    path.write_bytes(content)
    text = refused(path)
    assert all(word in text for word in words), text


def test_missing_files_and_folders_get_their_sentence(tmp_path):
    assert "does not exist" in refused(tmp_path / f"none{SUFFIX}")
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_not_even_opened(path, monkeypatch, zipped):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was unpickled"))
    for content in ({"0.features.cls": torch.ones(2, 6)}, {"x": Bomb(path.parent / "ran")}):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert "not a reference" in refused(path)
    assert not (path.parent / "ran").exists()


def test_more_than_the_limit_is_refused_before_it_is_read(path, monkeypatch):
    monkeypatch.setattr(reference_file, "LARGEST", 287)  # the tensors take 288 bytes
    monkeypatch.setattr(reference_file, "read_tensors", lambda *_: pytest.fail("it was read"))
    assert "limit" in refused(path)
    with pytest.raises(ValueError, match="cannot be saved.*limit"):
        save_reference(reference(), path)


def header_end(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def test_a_file_cut_off_anywhere_is_refused(path):
    content = path.read_bytes()
    ends = [*range(header_end(content) + 1), *range(header_end(content) + 1, len(content), 37)]
    for end in ends:
        path.write_bytes(content[:end])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


def test_lying_about_sizes_allocates_nothing(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for shape, end in (([2**40, 6], 24), ([2**62, 2**62], 2**128), ([10**400, 6], 24), ([1, 6], 2**63)):
        tensors = {key: entry(shape, 0, end) for key in ("0.features.cls", "0.null.cls")}
        path.write_bytes(raw_safetensors({"__metadata__": metadata, **tensors}, bytes(48)))
        refused(path)


def test_a_tensor_listed_twice_for_two_places_is_refused(path):
    content = path.read_bytes()
    end = header_end(content)
    header = content[8:end].decode()
    first = json.loads(header)["0.features.cls"]
    first["data_offsets"] = [offset + 4 for offset in first["data_offsets"]]
    doubled = header.rstrip()[:-1] + f',"0.features.cls":{json.dumps(first)}' + "}"
    path.write_bytes(raw_safetensors(doubled.encode(), content[end:]))
    assert "damaged" in refused(path)


def file_for(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / f"fuzzed{SUFFIX}"


@given(st.data())
def test_a_few_flipped_bytes_load_or_are_refused(tmp_path_factory, data):
    path = file_for(tmp_path_factory)
    save_reference(reference(), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    load_or_sentence(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["cls", "clip", 6]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "encoder", "kind", "width", "null", "type", "model", "x"]), inner)
    ),
    max_leaves=12,
)


@given(JSON, st.sampled_from([(), (0,), (0, "name"), (0, "encoder"), (0, "encoder", "vision_cfg"), (0, "width"), (1,)]))
@example([], (0, "kind"))
@example({"a": {"b": {"c": []}}}, (0, "encoder", "model"))
def test_any_json_in_the_metadata_loads_or_is_refused(tmp_path_factory, value, where):
    path = file_for(tmp_path_factory)
    save_reference(reference(), path)

    def edit(m):
        root = {"needs": json.loads(m[NEEDS_KEY])}
        parent, key = root, "needs"
        for step in where:
            parent, key = parent[key], step
        parent[key] = value
        return {**m, NEEDS_KEY: json.dumps(root["needs"])}

    rewrite(path, metadata=edit)
    load_or_sentence(path)


@given(
    st.dictionaries(
        st.sampled_from(["0.features.cls", "0.null.cls", "0.features.patches", "0.null.patches", "1.null.cls", "\ud800"]),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "F64", "I8", "BOOL", "F8_E8M0", "x", 3]),
                "shape": st.lists(st.integers(-1, 2**64) | st.sampled_from([1, 2, 3, 4, 6]), max_size=4),
                "data_offsets": st.lists(st.integers(-1, 2**64) | st.sampled_from([0, 48, 96, 192]), min_size=2, max_size=2),
            }
        ),
    ),
    st.integers(0, 400),
)  # fmt: skip
def test_any_list_of_tensors_loads_or_is_refused(tmp_path_factory, tensors, size):
    path = file_for(tmp_path_factory)
    save_reference(reference(), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    path.write_bytes(raw_safetensors({"__metadata__": metadata, **tensors}, bytes(size)))
    load_or_sentence(path)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(tmp_path_factory, content):
    path = file_for(tmp_path_factory)
    path.write_bytes(content)
    refused(path)
