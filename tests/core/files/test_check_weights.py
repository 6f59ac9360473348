"""scripts/check_weights.py: what a user with real files runs."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import public_layouts as public
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexip_core.untrained import mini

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO / "scripts"))
import check_weights


@pytest.fixture(scope="module")
def sd15_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Files of the real sizes in fp16, 45 to 100 MB."""
    unet = public.unet_on_meta(public.SD15)
    made = {"plain": (public.plain, 1024, 768), "plus": (public.plus, 1280, 768, 768, 12)}
    return {
        family: {
            key: value.half()
            for key, value in public.random_tensors(public.public_shapes(public.on_meta(*args), unet), 1).items()
        }
        for family, args in made.items()
    }


def rows_of(folder: Path) -> dict[str, check_weights.Row]:
    return {row.file: row for row in check_weights.check_folder(folder)}


def test_every_kind_of_file_gets_its_line(tmp_path, sd15_tensors, capsys):
    (tmp_path / "deep").mkdir()
    save_file(sd15_tensors["plus"], tmp_path / "a.safetensors")
    training = {"image_proj.": "image_proj_model.", "ip_adapter.": "adapter_modules."}
    torch.save(
        {training[key.partition(".")[0] + "."] + key.partition(".")[2]: t for key, t in sd15_tensors["plain"].items()},
        tmp_path / "deep" / "b.bin",
    )
    mini.make_mini_flexip(tmp_path / "native.safetensors")
    mini.make_mini_encoders(tmp_path / "deep")
    save_file({"lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    save_file(
        {"image_proj.proj.0.weight": torch.zeros(8, 512), "ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2)},
        tmp_path / "face.safetensors",
    )
    (tmp_path / "notes.txt").write_text("not looked at")
    rows = {Path(name).name: row for name, row in rows_of(tmp_path).items()}
    assert set(rows) == {
        "a.safetensors",
        "b.bin",
        "native.safetensors",
        mini.MINI_CLIP_FILE,
        mini.MINI_DINO_FILE,
        "lora.safetensors",
        "face.safetensors",
    }
    assert (rows["a.safetensors"].what, rows["a.safetensors"].loads) == ("IP-Adapter plus for SD1.5", "yes")
    assert (rows["b.bin"].what, rows["b.bin"].loads) == (
        "IP-Adapter plain for SD1.5, read from a training checkpoint",
        "yes",
    )
    for name in ("a.safetensors", "b.bin"):
        assert rows[name].wants.startswith("CLIP ViT-H/14") and float(rows[name].diffusers) < 1e-5
    assert (
        rows["native.safetensors"].what.startswith("FlexIP checkpoint for ")
        and rows["native.safetensors"].loads == "yes"
    )
    assert rows["native.safetensors"].wants.count("wide") == 2
    assert rows[mini.MINI_CLIP_FILE].what.startswith("CLIP ") and rows[mini.MINI_CLIP_FILE].loads == "yes"
    assert rows[mini.MINI_DINO_FILE].what.startswith("DINOv2 ") and rows[mini.MINI_DINO_FILE].loads == "yes"
    assert (rows["lora.safetensors"].what, rows["lora.safetensors"].loads) == (
        "nothing of FlexIP's, such as a checkpoint or a LoRA; not checked",
        "-",
    )
    assert "FaceID" in rows["face.safetensors"].what and rows["face.safetensors"].loads == "-"
    assert check_weights.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows) and lines[0].startswith("file")


@pytest.mark.parametrize(
    "breakage, words",
    [
        ("cut", "cut off"),
        ("missing", "no tensor ip_adapter.31.to_v_ip.weight"),
        ("nan", "not numbers"),
        ("page", "web page"),
    ],
)
def test_a_broken_file_is_told_and_fails(tmp_path, sd15_tensors, breakage, words, capsys):
    path, tensors = tmp_path / "a.safetensors", dict(sd15_tensors["plain"])
    if breakage == "missing":
        del tensors["ip_adapter.31.to_v_ip.weight"]
    if breakage == "nan":
        tensors["image_proj.norm.bias"] = torch.full((768,), float("nan")).half()
    save_file(tensors, path)
    if breakage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    if breakage == "page":
        path.write_text("<!DOCTYPE html><html>")
    row = rows_of(tmp_path)["a.safetensors"]
    assert row.loads == "NO" and words in row.what and "\n" not in row.what
    assert check_weights.main([str(tmp_path)]) == 1
    assert words in capsys.readouterr().out


def test_a_projection_that_differs_from_diffusers_is_told(tmp_path, sd15_tensors, monkeypatch):
    save_file(sd15_tensors["plain"], tmp_path / "a.safetensors")
    from flexip_core.files.ip_adapter import PlainProjection

    original = PlainProjection.forward
    monkeypatch.setattr(PlainProjection, "forward", lambda self, x: original(self, x) + 0.01)
    row = rows_of(tmp_path)["a.safetensors"]
    assert row.loads == "NO" and "differs from diffusers' by 1.0e-02" in row.what


def test_without_diffusers_it_says_so(tmp_path, sd15_tensors, monkeypatch):
    save_file(sd15_tensors["plain"], tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "diffusers.loaders.unet", None)
    row = rows_of(tmp_path)["a.safetensors"]
    assert (row.loads, row.diffusers) == ("yes", "not installed")


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    result = subprocess.run(
        [sys.executable, str(REPO / "scripts" / "check_weights.py"), str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and re.search(r"x\.safetensors .* nothing of FlexIP's, such as", result.stdout), (
        result.stderr
    )
    missing = subprocess.run(
        [sys.executable, str(REPO / "scripts" / "check_weights.py"), str(tmp_path / "gone")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 2 and "is not a folder" in missing.stderr


def test_a_model_in_parts_has_one_line_and_hidden_files_none(tmp_path: Path) -> None:
    mini.make_mini_encoders(tmp_path)
    tensors = load_file(tmp_path / mini.MINI_CLIP_FILE)
    (tmp_path / mini.MINI_CLIP_FILE).unlink()
    (tmp_path / mini.MINI_DINO_FILE).unlink()
    keys = list(tensors)
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        save_file({key: tensors[key] for key in part}, tmp_path / f"m-{number:05}-of-00002.safetensors")
    (tmp_path / "._m.safetensors").write_bytes(b"x")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "m.safetensors").write_bytes(b"x")
    (row,) = check_weights.check_folder(tmp_path)
    assert row.file == "m-00001-of-00002.safetensors" and row.what.startswith("CLIP ")
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    (row,) = check_weights.check_folder(tmp_path)
    assert row.loads == "NO" and "is part 1 of 2 of a model" in row.what
    if sys.platform != "win32":
        (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
        assert any(row.file == "gone.safetensors" and row.loads == "NO" for row in check_weights.check_folder(tmp_path))


def test_files_of_other_programs_are_no_fault_but_cut_off_ones_are(tmp_path: Path) -> None:
    torch.save({"model": argparse.Namespace(x=1)}, tmp_path / "detector.pt")
    assert check_weights.main([str(tmp_path)]) == 0
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>")
    assert check_weights.main([str(tmp_path)]) == 1
