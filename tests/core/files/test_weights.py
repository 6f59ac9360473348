"""Weight files: read whole and plain ones, refuse the rest in one sentence, never run code, never believe sizes."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexip_core.files.weights import read_header, read_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def raw_safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def one_sentence(error: pytest.ExceptionInfo, path: Path) -> str:
    text = str(error.value)
    assert text.startswith(path.name) and str(path.parent) in text, text
    assert text.endswith(".") and "\n" not in text and len(text) < 600, text
    return text


@pytest.mark.parametrize("name", ["x.safetensors", "x.sft", "x.bin"])
def test_safetensors_are_recognised_by_content(tmp_path, name):
    save_file(TENSORS, tmp_path / name, metadata={"flexip.format": "1"})
    header = read_header(tmp_path / name)
    assert header.shapes == {"a.weight": (2, 3), "b": (4,)}
    assert header.dtypes == {"a.weight": "float32", "b": "float16"}
    assert header.metadata == {"flexip.format": "1"}
    found = read_tensors(str(tmp_path / name))
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[k], TENSORS[k]) for k in found)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["x.bin", "x.pth", "x.safetensors"])
def test_torch_files_are_recognised_by_content(tmp_path, name, zipped):
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    header = read_header(tmp_path / name)
    assert header.shapes == {"a.weight": (2, 3), "b": (4,)}
    assert header.dtypes == {"a.weight": "float32", "b": "float16"}
    found = read_tensors(tmp_path / name)
    assert all(torch.equal(found[k], TENSORS[k]) for k in TENSORS)


def test_a_safetensors_header_that_starts_like_a_pickle_is_no_pickle(tmp_path):
    header = json.dumps({"t": entry([1], 0, 4)}).encode().ljust(0x80)  # the length's first byte is pickle's first byte
    path = write(tmp_path / "x.bin", raw_safetensors(header, bytes(4)))
    assert path.read_bytes()[0] == 0x80
    assert read_header(path).shapes == {"t": (1,)}


def test_only_the_asked_tensors_are_read_and_a_missing_one_is_named(tmp_path):
    for name, save in (("x.safetensors", save_file), ("x.bin", torch.save)):
        save(TENSORS, tmp_path / name)
        assert list(read_tensors(tmp_path / name, ["b"])) == ["b"]
        with pytest.raises(ValueError) as error:
            read_tensors(tmp_path / name, ["b", "nothere"])
        assert "'nothere'" in one_sentence(error, tmp_path / name)


def test_state_dict_is_unwrapped_and_nested_dicts_are_joined_with_dots(tmp_path):
    t = torch.ones(2)
    torch.save({"state_dict": {"a": t}, "epoch": 3, "optimizer": {"b": t}}, tmp_path / "lightning.ckpt")
    assert list(read_header(tmp_path / "lightning.ckpt").shapes) == ["a"]
    torch.save({"image_proj": {"norm.weight": t}, "ip_adapter": {"1.to_k.weight": t}}, tmp_path / "ip.bin")
    assert list(read_tensors(tmp_path / "ip.bin")) == ["image_proj.norm.weight", "ip_adapter.1.to_k.weight"]


def test_views_in_a_small_pickle_stay_views(tmp_path):
    torch.save({"big": torch.zeros(1).expand(1000, 1000, 1000, 1000)}, tmp_path / "x.bin")  # 4 TB if written
    assert read_header(tmp_path / "x.bin").shapes == {"big": (1000,) * 4}
    assert read_tensors(tmp_path / "x.bin")["big"].untyped_storage().nbytes() == 4


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_never_runs_it(tmp_path, zipped):
    path = tmp_path / "evil.pt"
    torch.save({"w": torch.ones(1), "x": Bomb(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    for read in (read_header, read_tensors):
        with pytest.raises(ValueError) as error:
            read(path)
        text = one_sentence(error, path)
        assert "could run code" in text and ".safetensors" in text and "weights_only" not in text
    assert not (tmp_path / "ran").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)  # the proof that the file was armed
    assert (tmp_path / "ran").exists()


GOOD = raw_safetensors({"t": entry([2, 2], 0, 16)}, bytes(16))
SAFETENSORS_FAULTS = {
    "cut_header": (struct.pack("<Q", 5000) + b'{"t":', ["header should take 5000 bytes", "has 13"]),
    "absurd_header": (struct.pack("<Q", 2**62) + b'{"t":', [str(2**62), "13"]),
    "cut_data": (GOOD[:-6], ["cut off", f"{len(GOOD) - 6} that the file has", "download it again"]),
    "extra_data": (GOOD + b"xx", ["too long", f"{len(GOOD) + 2} that the file has"]),
    "lying_shape": (raw_safetensors({"t": entry([1 << 20, 1 << 20], 0, 16)}, bytes(16)), ["shape", "do not agree"]),
    "hole": (raw_safetensors({"a": entry([4], 0, 16), "b": entry([2], 24, 32)}, bytes(32)), ["'b'", "leaves a gap"]),
    "negative_shape": (raw_safetensors({"t": entry([-2, -2], 0, 16)}, bytes(16)), ["damaged", "not valid JSON"]),
    "odd_shape": (raw_safetensors({"t": entry([2.5, True], 0, 16)}, bytes(16)), ["damaged", "not valid JSON"]),
    "no_shape": (raw_safetensors({"t": {"dtype": "F32"}}), ["damaged", "not valid JSON"]),
    "not_an_entry": (raw_safetensors({"t": 3}), ["damaged", "not valid JSON"]),
    "unknown_dtype": (raw_safetensors({"t": entry([2], 0, 1, "F4")}, b"x"), ["'F4'", "float16"]),
    "dtype_of_nobody": (raw_safetensors({"t": entry([2], 0, 1, "Q1")}, b"x"), ["damaged"]),
    "not_json": (raw_safetensors(b"{nothing here", bytes(16)), ["not valid JSON"]),
    "not_utf8": (raw_safetensors(b'{"\xff\xfe": 1}'), ["not valid JSON"]),
    "long_header": (
        raw_safetensors(b'{"t":' + b" " * 16_000_000 + b"1}"),
        ["header of 16000007 bytes", "16000000 are the limit"],
    ),
    "deep_json": (raw_safetensors(b'{"a":' + b"[" * 200_000), ["not valid JSON"]),
    "duplicate": (raw_safetensors(b'{"t":1,"t":2}'), ["damaged", "not valid JSON"]),
    "odd_metadata": (raw_safetensors({"__metadata__": {"a": {"b": 1}}}), ["damaged", "texts"]),
}


@pytest.mark.parametrize("fault", SAFETENSORS_FAULTS)
def test_every_damaged_safetensors_file_gets_its_sentence(tmp_path, fault):
    content, words = SAFETENSORS_FAULTS[fault]
    path = write(tmp_path / "model.safetensors", content)
    for read in (read_header, read_tensors):
        with pytest.raises(ValueError) as error:
            read(path)
        text = one_sentence(error, path)
        assert all(word in text for word in words), text


def test_overlapping_tensors_are_refused(tmp_path):
    content = raw_safetensors({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, bytes(16))
    path = write(tmp_path / "x.safetensors", content)
    with pytest.raises(ValueError) as error:
        read_tensors(path)
    assert "damaged" in one_sentence(error, path)


OTHER_FAULTS = {
    "empty": (b"", ["empty", "0 bytes"]),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["Git-LFS pointer", "download"]),
    "page": (b"\n<!DOCTYPE html><html>", ["web page", "direct link"]),
    "page_without_doctype": (b"<HTML lang=en>", ["web page"]),
    "text": (b"hello, I am a readme", ["not a weight file"]),
    "one_byte": (b"x", ["not a weight file"]),
    "plain_zip": (b"PK\x03\x04" + bytes(50), ["damaged or cut off", "54 bytes"]),
    "cut_pickle": (b"\x80\x02\x8a\x0a", ["damaged"]),
    "number_pickle": (pickle.dumps(3, protocol=2), ["damaged", "download"]),
}


@pytest.mark.parametrize("fault", OTHER_FAULTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_what_is_no_weight_file_gets_its_sentence(tmp_path, fault, suffix):
    content, words = OTHER_FAULTS[fault]
    path = write(tmp_path / f"model{suffix}", content)
    with pytest.raises(ValueError) as error:
        read_header(path)
    text = one_sentence(error, path)
    assert all(word in text for word in words), text


def test_missing_files_and_folders_get_their_sentence(tmp_path):
    for path, word in ((tmp_path / "none.safetensors", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError) as error:
            read_header(path)
        assert word in one_sentence(error, path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95])
def test_a_cut_off_torch_file_gets_its_sentence(tmp_path, keep):
    torch.save({"t": torch.ones(100, 100)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    path = write(tmp_path / "cut.pt", content[: int(len(content) * keep)])
    with pytest.raises(ValueError) as error:
        read_tensors(path)
    assert "cut off" in one_sentence(error, path)


def test_a_compressed_zip_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(20_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError) as error:
        read_header(path)
    assert "compressed" in one_sentence(error, path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_program_is_refused(tmp_path):
    path = tmp_path / "ViT-B-32.pt"  # OpenAI's CLIP files are TorchScript
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError) as error:
        read_header(path)
    assert "TorchScript" in one_sentence(error, path)


def test_odd_contents_of_pickles_get_their_sentence(tmp_path):
    cyclic: dict = {"t": torch.ones(1)}
    cyclic["again"] = cyclic
    for content, word in (
        (cyclic, "too deep"),
        ({"epoch": 3}, "no tensors"),
        ([torch.ones(1)], "no tensors"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "'a.b'"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError) as error:
            read_header(tmp_path / "x.pt")
        assert word in one_sentence(error, tmp_path / "x.pt")
