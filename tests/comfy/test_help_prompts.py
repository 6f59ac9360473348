"""The API prompt on each node's help page, put to ComfyUI's own check together with the nodes that its links lead to."""

from __future__ import annotations

import asyncio
import json
import re

import execution
import folder_paths
import pytest
from conftest import REPO
from flexip_pack.nodes import train
from test_schema import node_classes

import nodes as core

DOCS = REPO / "web" / "docs"
CLASSES = {node.define_schema().node_id: node for node in node_classes()}
FOUND_BY = ("LoadFlexIPAdapters", "EncodeReference", "ApplyFlexIPGate")  # whose numbers the pages' links use


def prompt_on(page: str) -> dict:
    (block,) = re.findall(r"```json\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(block)


def around() -> dict:
    """The nodes that the links of the pages lead to."""
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": "sd15.safetensors"}),
        "5": ("CLIPTextEncode", {"text": "a photo", "clip": ["1", 1]}),
        "6": ("CLIPTextEncode", {"text": "", "clip": ["1", 1]}),
        "7": ("EmptyLatentImage", {"width": 512, "height": 512, "batch_size": 1}),
        "8": ("LoadImage", {"image": "picture.png"}),
        "9": ("VAEDecode", {"samples": ["7", 0], "vae": ["1", 2]}),
    }
    made = {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}
    for page in FOUND_BY:
        made |= prompt_on(page)
    return made | {"10": prompt_on("EncodeReference")["3"]}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """ComfyUI's check with the pack's nodes and a file for every name on the pages."""
    table = dict(folder_paths.folder_names_and_paths)
    for folder, name in (
        ("checkpoints", "sd15.safetensors"),
        ("flexip", "flexip.safetensors"),
        ("ipadapter", None),
        ("clip_vision", None),
    ):
        (tmp_path / folder).mkdir()
        table[folder] = ([str(tmp_path / folder)], {".safetensors"})
        if name:
            (tmp_path / folder / name).write_bytes(b"x")
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    for name in ("picture.png", "hero.flexip-ref.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(train, "data_names", lambda: ["my_data"])
    for node_id, node in CLASSES.items():
        monkeypatch.setitem(core.NODE_CLASS_MAPPINGS, node_id, node)

    class Shows:
        """An output node for anything."""

        RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "run", True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"anything": ("*",)}}

        @classmethod
        def VALIDATE_INPUTS(cls, input_types):
            return True

    monkeypatch.setitem(core.NODE_CLASS_MAPPINGS, "Shows", Shows)
    return lambda prompt: asyncio.run(execution.validate_prompt("test", prompt, None))


def test_every_node_has_a_help_page_with_its_prompt():
    assert sorted(path.stem for path in DOCS.glob("*.md")) == sorted(CLASSES)
    for page in CLASSES:
        ((number, node),) = prompt_on(page).items()
        assert node["class_type"] == page and number.isdigit()


@pytest.mark.parametrize("page", sorted(CLASSES))
def test_the_prompt_of_each_help_page_is_valid_and_minimal(server, page):
    ((number, node),) = prompt_on(page).items()
    prompt = {**around(), number: node}
    if CLASSES[page].define_schema().outputs:
        prompt["shown"] = {"class_type": "Shows", "inputs": {"anything": [number, 0]}}
    valid, error, outputs, errors = server(prompt)
    assert valid and not errors, (error, errors)
    assert outputs
    for name in node["inputs"]:
        less = {key: value for key, value in node["inputs"].items() if key != name}
        if name == "references.reference_1":
            continue  # one is enough; the page shows how the second is called
        valid, error, _, errors = server({**prompt, number: {**node, "inputs": less}})
        assert not valid and "required_input_missing" in json.dumps([error, errors]), f"{name} could be left out"
