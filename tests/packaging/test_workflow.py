"""flexip_core/evaluation/workflow.py on hand-made graphs (tests/server compares it with what the web page makes of the same file), and what
the shipped workflows look like."""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from flexip_core.evaluation.workflow import nodes_of, set_inputs, to_prompt
from flexip_core.untrained import mini

OBJECT_INFO = {
    "Load": {
        "input": {"required": {"image": [["a.png", "b.png"], {"image_upload": True}]}},
        "input_order": {"required": ["image"]},
    },
    "Sample": {
        "input": {
            "required": {"picture": ["IMAGE"], "seed": ["INT", {"default": 0}], "steps": ["INT", {}]},
            "optional": {
                "mode": ["COMBO", {"options": ["x", "y"]}],
                "text": ["STRING", {"forceInput": True}],
                "on": ["BOOLEAN", {}],
            },
            "hidden": {"prompt": "PROMPT"},
        },
        "input_order": {
            "required": ["picture", "seed", "steps"],
            "optional": ["mode", "text", "on"],
            "hidden": ["prompt"],
        },
    },
    "Combine": {
        "input": {
            "required": {
                "parts": ["COMFY_AUTOGROW_V3", {"template": {}}],
                "seed": ["INT", {"control_after_generate": False}],
            },
            "optional": {"curve": ["CURVE", {"socketless": False}], "list": ["STRING", {"default": "0, 1"}]},
        },
        "input_order": {"required": ["parts", "seed"], "optional": ["curve", "list"]},
    },
}
WORKFLOW = {
    "nodes": [
        {
            "id": 3,
            "type": "Load",
            "mode": 0,
            "inputs": [{"name": "image", "link": None, "widget": {"name": "image"}}],
            "widgets_values": ["b.png", "image"],
        },
        {
            "id": 7,
            "type": "Sample",
            "mode": 0,
            "inputs": [{"name": "picture", "link": 11}, {"name": "steps", "link": 12, "widget": {"name": "steps"}}],
            "widgets_values": [5, "randomize", 20, "y", True],
        },
        {"id": 9, "type": "MarkdownNote", "widgets_values": ["Read me"]},
    ],
    "links": [[11, 3, 0, 7, 0, "IMAGE"], [12, 3, 1, 7, 1, "INT"]],
}
SHIPPED = sorted((REPO / "workflows").glob("*.json"))
TITLE = 30  # pixels above a node's position


def workflow(**changes: Any) -> dict[str, Any]:
    """WORKFLOW with changes to its Sample node."""
    out = copy.deepcopy(WORKFLOW)
    out["nodes"][1].update(changes)
    return out


def test_widgets_links_controls_and_notes() -> None:
    assert to_prompt(WORKFLOW, OBJECT_INFO) == {
        "3": {"class_type": "Load", "inputs": {"image": "b.png"}},
        "7": {
            "class_type": "Sample",
            "inputs": {"picture": ["3", 0], "seed": 5, "steps": ["3", 1], "mode": "y", "on": True},
        },
    }


def test_a_seed_without_control_value() -> None:
    prompt = to_prompt(workflow(widgets_values=[5, 20, "y", True]), OBJECT_INFO)
    assert prompt["7"]["inputs"]["seed"] == 5 and prompt["7"]["inputs"]["mode"] == "y"


def test_growing_inputs_curves_and_a_seed_without_control() -> None:
    curve = {"points": [[0, 0.9], [1, 0.3]], "interpolation": "linear"}
    slots = [{"name": f"parts.part_{number}", "link": link} for number, link in enumerate((11, 12, None))]
    node = {"id": 7, "type": "Combine", "inputs": slots, "widgets_values": [5, curve, "1"]}
    inputs = to_prompt({"nodes": [node], "links": WORKFLOW["links"]}, OBJECT_INFO)["7"]["inputs"]
    assert inputs == {"seed": 5, "curve": curve, "list": "1", "parts.part_0": ["3", 0], "parts.part_1": ["3", 1]}


def test_an_optional_widget_that_came_after_the_workflow_was_saved_has_its_default() -> None:
    node = {"id": 7, "type": "Combine", "widgets_values": [5, {"points": []}]}
    assert to_prompt({"nodes": [node], "links": []}, OBJECT_INFO)["7"]["inputs"]["list"] == "0, 1"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mode": 4}, "muted or bypassed"),
        ({"type": "NoSuchNode"}, r"Node 7 \(NoSuchNode\) is not known"),
        ({"widgets_values": [5, "fixed", 20, "y"]}, "saves 4 widget values, but has a widget 'on'"),
        ({"widgets_values": [5, "fixed", 20, "y", True, 1]}, "saves 6 widget values, but its inputs use only 5"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_prompt(workflow(**changes), OBJECT_INFO)


def test_set_inputs_changes_every_node_of_a_class_and_no_unknown_name() -> None:
    prompt = to_prompt(WORKFLOW, OBJECT_INFO)
    assert nodes_of(prompt, "Load") == ["3"]
    set_inputs(prompt, "Load", image="a.png")
    assert prompt["3"]["inputs"] == {"image": "a.png"}
    with pytest.raises(ValueError, match="no input picture"):
        set_inputs(prompt, "Load", picture="a.png")
    with pytest.raises(ValueError, match="no Save node"):
        set_inputs(prompt, "Save", x=1)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_workflow_is_tidy(path: Path) -> None:
    """Nodes lie apart, a note explains it, wires are whole, and no picture is needed that ComfyUI does not have."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    boxes = [(*node["pos"], *node["size"], f"{node['id']} ({node['type']})") for node in graph["nodes"]]
    for (x1, y1, w1, h1, one), (x2, y2, w2, h2, other) in itertools.combinations(boxes, 2):
        apart = x1 + w1 <= x2 or x2 + w2 <= x1 or y1 + h1 <= y2 - TITLE or y2 + h2 <= y1 - TITLE
        assert apart, f"{one} overlaps {other}"
    by_type: dict[str, list[dict]] = {}
    for node in graph["nodes"]:
        by_type.setdefault(node["type"], []).append(node)
    (note,) = by_type["MarkdownNote"]
    needs_files = "FlexIPDemoModels" not in by_type
    [text] = note["widgets_values"]
    assert ("models/checkpoints" if needs_files else "no file to download") in text
    assert "`" not in text, "Nodes 2.0 draws inline code in dark blue on grey"
    assert any(word in text for word in ("**Turn**", "**turn**")), "what to turn first"
    if mini.MINI_BASE in str(graph["nodes"]):
        assert (
            "**python scripts/mini_models.py ComfyUI/models**" in text
            and (REPO / "scripts" / "mini_models.py").is_file()
        )
    assert {node["widgets_values"][0] for node in by_type.get("LoadImage", ())} == (
        {"example.png"} if needs_files else set()
    )
    slots = {
        (node["id"], number): slot.get("link")
        for node in graph["nodes"]
        for number, slot in enumerate(node.get("inputs", []))
    }
    assert sorted(link for link in slots.values() if link is not None) == sorted(link[0] for link in graph["links"])
    for number, source, output, target, slot, _ in graph["links"]:
        assert slots[target, slot] == number
        sender = next(node for node in graph["nodes"] if node["id"] == source)
        assert number in sender["outputs"][output]["links"]


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_the_page_can_say_where_to_get_the_public_files(base: str) -> None:
    """It lists a node's models only under the very names that the node's widgets have."""
    graph = json.loads((REPO / "workflows" / f"flexip_with_ip_adapter_{base}.json").read_text(encoding="utf-8"))
    folders = {
        "CheckpointLoaderSimple": ["checkpoints"],
        "LoadFlexIPAdapters": ["ipadapter", "ipadapter", "clip_vision"],
    }
    [text] = next(node["widgets_values"] for node in graph["nodes"] if node["type"] == "MarkdownNote")
    for node in graph["nodes"]:
        models = node["properties"].get("models", [])
        assert [model["directory"] for model in models] == folders.get(node["type"], [])
        for model in models:
            assert model["name"] in node["widgets_values"] and model["name"] in text
            assert re.fullmatch(
                r"https://huggingface\.co/[\w-]+/[\w.-]+/resolve/main/[\w./-]+\.safetensors", model["url"]
            )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_workflow_has_a_thumbnail(path: Path) -> None:
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as image:
        assert image.format == "JPEG" and image.width == 640


def test_workflow_names_fit_the_pages_link_to_a_template() -> None:
    for path in SHIPPED:
        assert path.stem.startswith("flexip_") and path.stem.replace("_", "").isalnum()
