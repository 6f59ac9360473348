"""The shipped IP-Adapter workflows in a real server, with files of the published layouts and sizes and random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import PACK, REFERENCE, REPO
from server import CPU_ARGUMENTS, ComfyServer

from flexip_core.evaluation.workflow import set_inputs, to_prompt
from flexip_core.untrained.mini_checkpoints import make_base

sys.path.append(str(REPO / "tests" / "fixtures"))
from ip_adapter_files import write_clip_vit_l, write_ip_adapter

SIZE = {"sd15": 64, "sdxl": 128}


def make_files(models: Path, base: str, layout: str) -> None:
    name = {"sd15": "SD1.5", "sdxl": "SDXL"}[base]
    make_base(models / "checkpoints" / f"{base}.ckpt", layout)
    write_clip_vit_l(models / "clip_vision" / "any" / "name.bin")
    write_ip_adapter(models / "ipadapter" / "one.bin", "plus", name)
    write_ip_adapter(models / "ipadapter" / "nested" / "two.bin", "plain", name, seed=3)


def run(comfy: ComfyServer, base: str, **gate: float) -> dict:
    path = REPO / "workflows" / f"flexip_with_ip_adapter_{base}.json"
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), comfy.get("/object_info"))
    set_inputs(prompt, "CheckpointLoaderSimple", ckpt_name=f"{base}.ckpt")
    set_inputs(
        prompt, "LoadFlexIPAdapters", preservation="one.bin", personalization="nested/two.bin", clip_vision="auto"
    )
    set_inputs(prompt, "LoadImage", image=REFERENCE)
    set_inputs(prompt, "EmptyLatentImage", width=SIZE[base], height=SIZE[base])
    set_inputs(prompt, "KSampler", steps=1)
    set_inputs(prompt, "ApplyFlexIPGate", **gate)
    return comfy.run(prompt).outputs


def check(comfy: ComfyServer, base: str, blocks: int) -> None:
    pictures = []
    for gate in (0.0, 1.0):
        outputs = run(comfy, base, gate=gate)
        image = next(
            output["images"][0]
            for output in outputs.values()
            if output.get("images", [{"subfolder": ""}])[0]["subfolder"] == "flexip"
        )
        pictures.append(comfy.view(image))
    assert pictures[0] != pictures[1]
    log = comfy.log_text()
    assert f"{blocks} of {blocks} blocks patched" in log and "tokens 16 + 4" in log


def test_sd15_with_a_pair_of_files(comfy: ComfyServer, models: Path) -> None:
    make_files(models, "sd15", "sd15_full")
    check(comfy, "sd15", 16)


@pytest.mark.long
def test_sdxl_with_a_pair_of_files(comfyui_tree: Path, tmp_path: Path) -> None:
    """2.6 billion parameters: in a server of its own, in bfloat16."""
    import shutil

    import skimage.data

    make_files(tmp_path / "models", "sdxl", "sdxl_full")
    with ComfyServer(comfyui_tree, tmp_path, packs={PACK: REPO}, arguments=[*CPU_ARGUMENTS, "--bf16-unet"]) as server:
        shutil.copyfile(Path(skimage.data.__file__).parent / REFERENCE, tmp_path / "input" / REFERENCE)
        check(server, "sdxl", 70)
