"""The pack in a real ComfyUI server, over HTTP and websocket."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import PACK, REPO
from PIL import Image
from server import ComfyServer, PromptError

from flexip_core.untrained import mini

WORKFLOWS = sorted((REPO / "workflows").glob("*.json"))


def stock_prompt(**sampler: object) -> dict:
    """Text to image with ComfyUI's own nodes and the mini base."""
    settings = {"seed": 1, "steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": mini.MINI_BASE}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a photo"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "bad"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 96, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {**links, **settings, **sampler}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "test"}},
    }


def pictures(comfy: ComfyServer, outputs: dict) -> list[Image.Image]:
    """Everything that the nodes of a run saved or previewed."""
    files = [image for output in outputs.values() for image in output.get("images", [])]
    return [Image.open(io.BytesIO(comfy.view(file))).convert("RGB") for file in files]


def nodes_of_the_pack(comfy: ComfyServer) -> dict[str, dict]:
    object_info = comfy.get("/object_info")
    return {key: info for key, info in object_info.items() if info["python_module"] == f"custom_nodes.{PACK}"}


def test_pack_is_imported(comfy: ComfyServer) -> None:
    folder = str(comfy.base / "custom_nodes" / PACK)
    ours = [line for line in comfy.log_text().splitlines() if folder in line]  # core's own nodes may lack a package
    for trouble in ("IMPORT FAILED", "Cannot import", "Error while calling comfy_entrypoint"):
        assert not [line for line in ours if trouble in line]
    assert any(f"seconds: {folder}" in line for line in ours)


def test_nodes_are_listed_with_a_tooltip_on_every_socket(comfy: ComfyServer) -> None:
    nodes = nodes_of_the_pack(comfy)
    assert {"LoadFlexIPAdapters", "EncodeReference", "ApplyFlexIPGate", "FlexIPSampler"} <= nodes.keys()
    for node_id, info in nodes.items():
        assert info["category"].startswith("FlexIP/")
        for group in ("required", "optional"):
            for name, (_, options) in info["input"].get(group, {}).items():
                assert options.get("tooltip"), f"{node_id}.{name}"
        assert all(info["output_tooltips"]), node_id


def test_stock_nodes_run_with_the_mini_base(comfy: ComfyServer) -> None:
    run = comfy.run(stock_prompt())
    [picture] = pictures(comfy, run.outputs)
    assert picture.size == (64, 96)
    assert np.asarray(picture).std() > 10, "the picture is flat"
    kinds = [message["type"] for message in run.messages]
    assert "progress_state" in kinds and kinds[-1] == "execution_success"


def test_refused_prompt_names_node_and_input(comfy: ComfyServer) -> None:
    with pytest.raises(PromptError, match=r"KSampler \(5\).*sampler_name") as refused:
        comfy.run(stock_prompt(sampler_name="no such sampler"))
    assert refused.value.details["node_errors"]["5"]["errors"]


def test_workflows_are_listed_as_templates(comfy: ComfyServer) -> None:
    assert sorted(comfy.get("/workflow_templates")[PACK]) == [path.stem for path in WORKFLOWS]


def test_every_node_has_a_help_page_with_its_picture_and_all_inputs(comfy: ComfyServer) -> None:
    for node_id, info in nodes_of_the_pack(comfy).items():
        page = comfy.get_bytes(f"/extensions/{PACK}/docs/{node_id}.md").decode()
        title, _, picture, _, text = page.split("\n", 4)
        assert title == f"# {info['display_name']}"
        assert picture == f"![{info['display_name']}]({node_id}.png)"
        with Image.open(io.BytesIO(comfy.get_bytes(f"/extensions/{PACK}/docs/{node_id}.png"))) as image:
            assert image.format == "PNG" and 400 < image.width < 700, node_id
        inputs = [name for group in ("required", "optional") for name in info["input"].get(group, {})]
        assert [name for name in inputs if not re.search(rf"\b{name}\b", text)] == [], node_id


def test_import_is_cheap_and_touches_nothing(comfyui_tree: Path) -> None:
    """Beyond ComfyUI's own imports: under 0.5 s of the processor, no heavy library, no GPU, no connection."""
    script = """
        import importlib.util, socket, sys, time
        sys.path.insert(0, sys.argv[1])
        repo = sys.argv[2]
        sys.argv = [sys.argv[0], "--cpu"]
        import comfy.options
        comfy.options.enable_args_parsing()
        import comfy.sd, comfy.sample, comfy_api.v0_0_2, folder_paths, latent_preview, nodes, torch
        from comfy_execution import graph_utils

        before = set(sys.modules)
        def refuse(*args, **kwargs):
            raise AssertionError("the import opens a connection")
        socket.socket = socket.create_connection = refuse
        start = time.process_time()
        spec = importlib.util.spec_from_file_location("pack", repo + "/__init__.py", submodule_search_locations=[repo])
        sys.modules["pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["pack"])
        seconds = time.process_time() - start

        imported = {name.split(".")[0] for name in set(sys.modules) - before}
        assert not imported & {"open_clip", "timm", "torchvision", "diffusers"}, imported
        assert not torch.cuda.is_initialized()
        assert seconds < 0.5, seconds
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(comfyui_tree), str(REPO)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui_tree)
    assert done.returncode == 0, done.stderr[-3000:]
