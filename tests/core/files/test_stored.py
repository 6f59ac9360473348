"""One set of tensors in several forms: parts beside each other, and float8 with a scale beside each weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexip_core.files.stored import first_parts
from flexip_core.files.weights import read_header, read_tensors, read_weights

TENSORS = {f"layer.{n}.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(6)}


def write(path: Path, tensors: dict) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def in_parts(folder: Path, ending: str, names: tuple[list[str], ...]) -> list[Path]:
    return [
        write(folder / f"model-{n:05}-of-{len(names):05}{ending}", {key: TENSORS[key] for key in part})
        for n, part in enumerate(names, 1)
    ]


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_every_part_stands_for_the_whole_set(tmp_path, ending):
    keys = list(TENSORS)
    for path in in_parts(tmp_path, ending, (keys[:1], keys[1:4], keys[4:])):
        assert read_header(path).shapes == {key: (4, 3) for key in keys} and read_header(path).path == path
        assert all(torch.equal(value, TENSORS[key]) for key, value in read_tensors(path).items())
        assert list(read_tensors(path, [keys[5], keys[0]])) == [keys[5], keys[0]]


def test_a_set_that_is_not_whole_says_which_part_this_is_and_which_is_missing(tmp_path):
    keys = list(TENSORS)
    first, second, third = in_parts(tmp_path, ".safetensors", (keys[:2], keys[2:4], keys[4:]))
    second.unlink()
    words = r"model-00001-of-00003\.safetensors .* is part 1 of 3 .*model-00002-of-00003\.safetensors does not lie beside it"
    for read in (read_header, read_tensors):
        with pytest.raises(ValueError, match=words):
            read(first)
    third.unlink()
    with pytest.raises(ValueError, match="00002-of-00003.safetensors and 1 more"):
        read_header(first)


def test_parts_that_hold_the_same_tensor_are_refused(tmp_path):
    keys = list(TENSORS)
    first, _ = in_parts(tmp_path, ".safetensors", (keys[:3], keys[2:]))
    with pytest.raises(ValueError, match="another part both hold the tensor 'layer.2.weight'"):
        read_header(first)


@pytest.mark.parametrize(
    "name", ["a-00000-of-00002.bin", "a-00003-of-00002.bin", "a-1-of-2.bin", "a-00001-of-99999.bin"]
)
def test_a_name_that_only_looks_like_a_part_is_a_file(tmp_path, name):
    assert read_header(write(tmp_path / name, TENSORS)).shapes.keys() == TENSORS.keys()


def test_a_list_of_names_has_each_set_once():
    names = [
        "L/m-00001-of-00002.bin",
        "L/m-00002-of-00002.bin",
        "H/m-00001-of-00002.bin",
        "m-00002-of-00002.bin",
        "x.bin",
    ]
    assert first_parts(names) == [names[0], names[2], names[3], names[4]]


SCALED = {
    "one number": (".scale_weight", lambda: torch.tensor(0.25)),
    "one in a list": (".scale_weight", lambda: torch.tensor([0.25])),
    "ComfyUI's new names": (".weight_scale", lambda: torch.tensor(0.25)),
    "one per row": (".weight_scale", lambda: torch.tensor([0.5, 1.0, 2.0, 3.0])),
    "one per row, as a column": (".weight_scale", lambda: torch.tensor([[0.5], [1.0], [2.0], [3.0]])),
    "half precision": (".scale_weight", lambda: torch.tensor(0.25, dtype=torch.float16)),
}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_float8_weights_are_multiplied_by_their_scales(tmp_path, ending, case, dtype):
    name, scale = SCALED[case]
    weight, bias = TENSORS["layer.0.weight"].to(dtype), torch.randn(4)
    tensors = {"x.weight": weight, f"x{name}": scale(), "x.bias": bias, "y.weight": weight.clone()}
    tensors |= {
        "scaled_fp8": torch.empty(2, dtype=dtype),
        "x.scale_input": torch.ones(()),
        "x.comfy_quant": torch.zeros(3, dtype=torch.uint8),
    }
    path = write(tmp_path / f"a{ending}", tensors)
    assert read_header(path).shapes == {"x.weight": (4, 3), "x.bias": (4,), "y.weight": (4, 3)}
    found = read_weights(path)
    column = scale().float().reshape(-1, 1)
    assert found.keys() == {"x.weight", "x.bias", "y.weight"}
    assert torch.equal(found["x.weight"], weight.float() * column) and found["x.weight"].dtype == torch.float32
    assert torch.equal(found["x.bias"], bias) and torch.equal(found["y.weight"].float(), weight.float())
    assert read_tensors(path, ["x.weight"]).keys() == {"x.weight"}


@pytest.mark.parametrize(
    "weight, scale",
    [
        (torch.zeros(4, 3, dtype=torch.float16), torch.ones(())),
        (torch.zeros(4, 3, dtype=torch.int8), torch.ones(4)),
        (torch.zeros(4, 3).to(torch.float8_e4m3fn), torch.ones(2, 3)),
        (torch.zeros(4, 3).to(torch.float8_e4m3fn), torch.ones(4, 1).to(torch.float8_e4m3fn)),
    ],
    ids=["no float8", "int8", "blocks", "scales in float8"],
)
def test_another_quantisation_keeps_its_tensors_so_that_it_is_refused(tmp_path, weight, scale):
    path = write(tmp_path / "a.safetensors", {"x.weight": weight, "x.weight_scale": scale})
    assert read_header(path).shapes.keys() == {"x.weight", "x.weight_scale"}
