"""scripts/workflow.py on hand-made graphs; tests/server compares it with what the web page makes of the same file."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from workflow import nodes_of, set_inputs, to_prompt  # noqa: E402

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
