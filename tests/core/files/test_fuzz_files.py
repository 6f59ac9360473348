"""Damaged and hostile safetensors files of every kind that the pack reads (row 19 of the users' table: broken or pickled
weight files): one sentence with the file's name, whatever is in them.
"""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
import weight_files
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load, save
from weight_files import join, outcome, pairs, refused, split, whole

KINDS = weight_files.kinds()
NAMES = list(KINDS)


@pytest.fixture(autouse=True, scope="module")
def tiny_bases():
    with pytest.MonkeyPatch.context() as monkeypatch:
        weight_files.tiny_bases(monkeypatch)
        yield


@pytest.fixture
def path(tmp_path):
    return tmp_path / "my file.safetensors"


@pytest.fixture
def write(tmp_path):
    """Puts bytes into a file whose name, which every refusal must hold, tells the case."""

    def write(content, kind, what="my file", suffix=".safetensors"):
        path = tmp_path / f"{kind.name}, {what}{suffix}"
        path.write_bytes(content)
        return path

    return write


def test_every_kind_of_file_loads_while_it_is_whole(path):
    """Without this a reader that refuses everything would pass all that follows."""
    for kind in KINDS.values():
        path.write_bytes(kind.content)
        assert not isinstance(found := outcome(kind.read, path), str), (kind.name, found)


def ends(content: bytes, step: int) -> list[int]:
    header = 8 + struct.unpack("<Q", content[:8])[0]
    return [*range(0, header + 1, step), *range(header + 1, len(content), max(1, len(content) // 20))]


@whole
def test_a_file_cut_off_at_any_byte_is_refused(path, whole):
    """Every byte of the header in the long run; each kind starts elsewhere, so that more of them are met somewhere."""
    for start, kind in enumerate(KINDS.values()):
        for end in [*ends(kind.content, 1)[start :: 1 if whole else 77], len(kind.content) - 1]:
            path.write_bytes(kind.content[:end])
            refused(kind.read, path)


OTHER_THINGS = {
    "nothing": (b"", "is empty"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git-LFS pointer"),
    "web page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html><body>404", "web page"),
    "web page without doctype": (b"<html lang=en>" + b" " * 5000, "web page"),
    "json answer": (b'{"error": "Repository not found"}', "not a weight file"),
    "text": (b"Access to this model is restricted.", "not a weight file"),
    "zeros": (bytes(4096), "not a weight file"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a weight file"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "not a weight file"),
    "seven bytes": (b"\x01" * 7, "not a weight file"),
    "old tar": (b"storages".ljust(257, b"\0") + b"ustar\x0000" + bytes(800), "not a weight file"),
}


@whole
def test_what_came_instead_of_the_weights_is_named(write, whole):
    named = [(thing, suffix) for suffix in (".safetensors", ".bin") for thing in OTHER_THINGS]
    for kind, (thing, suffix) in pairs(KINDS, named, whole):
        content, words = OTHER_THINGS[thing]
        assert words in refused(kind.read, write(content, kind, thing, suffix))


def test_folders_pipes_and_missing_files_are_named(tmp_path):
    import os

    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening one would wait for ever
    for kind in KINDS.values():
        for name, words in (("folder", "is a folder"), ("pipe", "is not a file"), ("none", "does not exist")):
            assert words in refused(kind.read, tmp_path / f"{name}.safetensors"), kind.name


def first_tensor(header: dict) -> str:
    return next(key for key in header if key != "__metadata__")


def edited(content: bytes, **changes) -> bytes:
    header, data = split(content)
    key = first_tensor(header)
    header[key] = {**header[key], **changes}
    return join(header, data)


HUGE = 2**40
HEADER_FAULTS = {
    "header longer than the file": lambda c: struct.pack("<Q", len(c)) + c[8:],
    "header of 2**63 bytes": lambda c: struct.pack("<Q", 2**63) + c[8:],
    "header of all bytes": lambda c: b"\xff" * 8 + c[8:],
    "header of no bytes": lambda c: bytes(8) + c[8:],
    "huge shape": lambda c: edited(c, shape=[HUGE]),
    "huge shape and offsets": lambda c: edited(c, shape=[HUGE], data_offsets=[0, 4 * HUGE]),
    "shape beyond 64 bits": lambda c: edited(c, shape=[2**40, 2**40], data_offsets=[0, 2**82]),
    "shape that wraps to the right size": lambda c: edited(c, shape=[2**62, 8], data_offsets=[0, 0]),
    "empty but huge": lambda c: edited(c, shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "number of 4000 digits": lambda c: edited(c, shape=[10**4000]),
    "a million dimensions": lambda c: edited(c, shape=[1] * 1_000_000),
    "negative shape": lambda c: edited(c, shape=[-1, -8]),
    "negative offsets": lambda c: edited(c, data_offsets=[-8, -4]),
    "offsets beyond the file": lambda c: edited(c, shape=[1], data_offsets=[len(c), len(c) + 4]),
    "offsets backwards": lambda c: edited(c, data_offsets=[64, 0]),
    "one offset": lambda c: edited(c, data_offsets=[0]),
    "offsets of text": lambda c: edited(c, data_offsets="04"),
    "shape of text": lambda c: edited(c, shape="12"),
    "shape of an object": lambda c: edited(c, shape={"1": 2}),
    "shape of yes": lambda c: edited(c, shape=[True]),
    "dtype of a list": lambda c: edited(c, dtype=["F32"]),
    "unknown dtype": lambda c: edited(c, dtype="F4\n" * 500),
    "no tensors": lambda c: join({"__metadata__": split(c)[0].get("__metadata__", {})}, b""),
    "metadata of text": lambda c: join({**split(c)[0], "__metadata__": "flexip"}, split(c)[1]),
    "metadata of numbers": lambda c: join({**split(c)[0], "__metadata__": {"flexip.format": 1}}, split(c)[1]),
    "metadata nested": lambda c: join({**split(c)[0], "__metadata__": {"flexip.format": {"a": ["1"]}}}, split(c)[1]),
    "a list": lambda c: join(b'{"a":[' + b"[" * 90_000 + b"]" * 90_000 + b"]}", split(c)[1]),
    "not utf-8": lambda c: join(b'{"\xff\xfe":1}', split(c)[1]),
    "half a letter as a name": lambda c: join({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "a name of many lines": lambda c: join({"a\nb" * 9000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
}  # fmt: skip


@whole
def test_a_false_header_is_refused(write, whole):
    for kind, fault in pairs(KINDS, HEADER_FAULTS, whole):
        refused(kind.read, write(HEADER_FAULTS[fault](kind.content), kind, fault))


def test_a_name_that_stands_twice_for_two_places_is_refused(write):
    """One that stands for the same place twice means nothing else than once, and the library takes it so."""
    for kind in KINDS.values():
        header, data = split(kind.content)
        key = first_tensor(header)
        begin, end = header[key]["data_offsets"]
        moved = {**header[key], "data_offsets": [begin + len(data), end + len(data)]}
        twice = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(moved)}" + "}"
        refused(kind.read, write(join(twice.encode(), data + data[: end - begin]), kind))


def test_tensors_that_overlap_or_leave_gaps_are_refused(write):
    for kind in KINDS.values():
        header, data = split(kind.content)
        by_place = sorted((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
        first, second = (dict(header[key]) for key in by_place[:2])
        size = [end - begin for begin, end in (first["data_offsets"], second["data_offsets"])]
        second["data_offsets"] = [0, size[1]]  # over the first one
        assert "damaged" in refused(kind.read, write(join({**header, by_place[1]: second}, data), kind))
        for key in by_place:
            header[key]["data_offsets"] = [offset + 8 for offset in header[key]["data_offsets"]]
        assert "gap" in refused(kind.read, write(join(header, bytes(8) + data), kind))


DTYPES = ("int8", "int64", "uint8", "bool", "complex64", "float8_e4m3fn", "float64", "bfloat16")


@whole
def test_another_dtype_loads_or_is_refused_by_name(write, whole):
    """Whole numbers would compute nonsense in silence; float8 is a storage format and is cast when it is used. Only
    references are particular about floats, so that these meet all dtypes."""
    for kind, name in [*pairs(KINDS, DTYPES, whole), *((KINDS["reference"], name) for name in DTYPES)]:
        dtype = getattr(torch, name)
        tensors = {key: value.to(dtype) for key, value in load(kind.content).items()}
        found = outcome(kind.read, write(save(tensors, split(kind.content)[0].get("__metadata__")), kind, name))
        whole_numbers = not dtype.is_floating_point
        particular = kind.name == "reference" and name in ("float8_e4m3fn", "float64")
        assert isinstance(found, str) == (whole_numbers or particular), (kind.name, name, found)
        assert not whole_numbers or name in found


@whole
def test_weights_that_are_not_numbers_are_refused(write, whole):
    """They would draw black pictures (rows 4 and 19)."""
    values, dtypes = (float("nan"), float("inf"), -float("inf")), ("float32", "float16", "float8_e5m2")
    for kind, (value, dtype) in pairs(KINDS, [(value, dtype) for value in values for dtype in dtypes], whole):
        header, tensors = split(kind.content)[0], load(kind.content)
        key = sorted(tensors)[-1]
        tensors[key].view(-1)[-1] = value
        if not (kind.name == "reference" and dtype.startswith("float8")):
            tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
        text = refused(kind.read, write(save(tensors, header.get("__metadata__")), kind, f"{value} {dtype}"))
        assert "not numbers" in text and key in text


@given(st.sampled_from(NAMES), st.data())
def test_flipped_header_bytes_load_or_are_refused(tmp_path_factory, name, data):
    kind, path = KINDS[name], tmp_path_factory.getbasetemp() / "flipped.safetensors"
    content = bytearray(kind.content)
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    outcome(kind.read, path)


@given(st.sampled_from(NAMES), st.floats(0, 1, exclude_max=True), st.integers(0, 255))
def test_changed_data_bytes_load_or_are_refused(tmp_path_factory, name, place, value):
    kind, path = KINDS[name], tmp_path_factory.getbasetemp() / "changed.safetensors"
    content = bytearray(kind.content)
    end = 8 + struct.unpack("<Q", content[:8])[0]
    content[end + int(place * (len(content) - end))] = value
    path.write_bytes(content)
    outcome(kind.read, path)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 28, 63, 64, 65, 2**31]), max_size=5).filter(
    lambda shape: math.prod(shape) <= 10_000 and shape.count(2**31) < 2  # what torch can make, and quickly
)


@given(st.sampled_from(NAMES), st.data())
def test_any_shapes_in_place_of_the_right_ones_load_or_are_refused(tmp_path_factory, name, data):
    """The header is sound, and the tensors are there: only they are not what the names promise."""
    kind, path = KINDS[name], tmp_path_factory.getbasetemp() / "shapes.safetensors"
    header, tensors = split(kind.content)[0], load(kind.content)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        shape = data.draw(SHAPES)
        if data.draw(st.integers(0, 9)) == 0:
            tensors.pop(key, None)
        else:
            tensors[key] = torch.ones(shape)
    path.write_bytes(save(tensors, header.get("__metadata__")))
    outcome(kind.read, path)


@given(st.sampled_from(["plain", "plus"]), st.data())
def test_any_shapes_in_an_ip_adapter_load_or_are_refused(tmp_path_factory, family, data):
    path = tmp_path_factory.getbasetemp() / "shapes.safetensors"
    tensors = weight_files.ip_adapter_tensors(family)
    path.write_bytes(save(tensors))
    assert not isinstance(outcome(KINDS["ip-adapter"].read, path), str)
    projection = sorted(key for key in tensors if key.startswith("image_proj."))
    for key in data.draw(st.lists(st.sampled_from(projection), min_size=1, max_size=2)):
        tensors[key] = torch.ones(data.draw(SHAPES))
    path.write_bytes(save(tensors))
    outcome(KINDS["ip-adapter"].read, path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 2**40]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["input.1.0", "width", "a\nb"]), inner),
    max_leaves=8,
)
FIELDS = [(), ("base",), ("blocks",), ("text_width",), ("clip",), ("clip", "vision_cfg"), ("clip", "model"),
          ("dino", "args"), ("resampler", "depth"), ("resampler", "width"), ("detail_tokens",), ("gate_mode",)]  # fmt: skip


@given(JSON, st.sampled_from(FIELDS))
@example(2**31, ("resampler", "depth"))  # each layer would be built
@example(10**300, ("text_width",))
@example({f"input.{i}.0": 8 for i in range(2000)}, ("blocks",))
@example({"a/../b": 8}, ("blocks",))
@example({"input.1.0.preservation": 8}, ("blocks",))
@example({"training.1.0": 8}, ("blocks",))
@example("two\nlines", ("base",))
def test_any_json_in_a_checkpoints_config_loads_or_is_refused(tmp_path_factory, value, where):
    path = tmp_path_factory.getbasetemp() / "config.safetensors"
    header, data = split(KINDS["flexip"].content)
    root = {"config": json.loads(header["__metadata__"]["flexip.config"])}
    parent, key = root, "config"
    for step in where:
        parent, key = parent[key], step
    parent[key] = value
    header["__metadata__"]["flexip.config"] = json.dumps(root["config"])
    path.write_bytes(join(header, data))
    outcome(KINDS["flexip"].read, path)


def test_a_config_that_is_no_config_is_refused(path):
    for text in ("", "{", "[" * 500 + "]" * 500, "[" * 90_000, '{"base": 1e999}', "9" * 5000, "\0", "null"):
        for key, kind in (("flexip.config", "flexip"), ("flexip.needs", "reference")):
            header, data = split(KINDS[kind].content)
            header["__metadata__"][key] = text
            path.write_bytes(join(header, data))
            assert "damaged" in refused(KINDS[kind].read, path), (kind, text[:20])


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(content)
    for kind in KINDS.values():
        refused(kind.read, path)
    path.write_bytes(struct.pack("<Q", len(content) + 1) + b"{" + content)
    for kind in KINDS.values():
        refused(kind.read, path)
