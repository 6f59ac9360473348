"""Every template workflow, and every workflow as it was shipped once: run by the real server, and opened in the real page."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO
from page import run, set_widgets
from PIL import Image
from playwright.sync_api import Browser, Page
from server import ComfyServer
from test_page import MISSING, READY, STOCK_ERRORS, browser, example_picture  # noqa: F401

from flexip_core.evaluation.workflow import set_inputs, to_prompt

TEMPLATES = sorted((REPO / "workflows").glob("*.json"))
_CURRENT = {path.read_bytes() for path in TEMPLATES}
SHIPPED_ONCE = [  # those that are not what is shipped now; tests/packaging/test_shipped.py says that all are there
    path
    for path in sorted((REPO / "tests" / "fixtures" / "shipped_workflows").rglob("*.json"))
    if path.read_bytes() not in _CURRENT
]
FILES = [*TEMPLATES, *SHIPPED_ONCE]
WITH_MINI_MODELS = [path for path in FILES if "ip_adapter" not in path.stem]
SMALL = {
    "EmptyLatentImage": {"width": 64, "height": 64},
    "ImageScale": {"width": 64, "height": 64},
    "BasicScheduler": {"steps": 2},
    "KSampler": {"steps": 2},
    "FlexIPSampler": {"steps": 2},
    "FlexIPAutoGate": {"steps": 1, "noises": 1},
    "FlexIPAttentionMaps": {"steps": 1},
}
# What FlexIP reports of a run, beside the number of pictures that are saved or shown by core's nodes.
SAID = {
    "flexip_basic": (["gate 0.6"], 1),
    "flexip_demo_world": (["gate 0, 0.25, 0.5, 0.75, 1", "adapters: demo adapters"], 1),
    "flexip_gate_sweep": (["gate 0, 0.25, 0.5, 0.75, 1"], 1),
    "flexip_style_over_time": (["gate 0.9, 0.2"], 1),
    "flexip_two_characters_by_mask": (["gate 0.7", "\n\nreference used, gate 0.70"], 1),
    "flexip_image_to_image": (["2 of 2 steps"], 1),
    "flexip_batch_of_references": (["gate 0.9, 0.3", "3 picture(s) in 3 references, one per batch item"], 6),
    "flexip_scores_and_attention_maps": (["gate 0.25: CLIP-I", "FlexIP attention maps", "personalization:"], 0),
    "flexip_auto_gate": (["FlexIP Auto Gate", "DINO-I"], 1),
    "flexip_regional_prompts": (["2 prompt(s) brought their own reference or gate"], 1),
}
# Of every node, as it is drawn: in Nodes 2.0 what the page made of it.
BOXES = """() => app.graph.nodes.map(node => { const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    const [scale, [x, y]] = [app.canvas.ds.scale, app.canvas.ds.offset];
    const box = drawn ? [drawn.left / scale - x, drawn.top / scale - y, drawn.right / scale - x, drawn.bottom / scale - y]
        : [node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, node.pos[0] + node.size[0], node.pos[1] + node.size[1]];
    return [`${node.id} ${node.title}`, ...box]; })"""
GROUPS = "app.graph.groups.map(g => [g.title, g.pos[0], g.pos[1], g.pos[0] + g.size[0], g.pos[1] + g.size[1]])"
WIRES = """() => [...app.graph.links.values()].map(link =>
    [Number(link.origin_id), link.origin_slot, Number(link.target_id), app.graph.getNodeById(link.target_id).inputs[link.target_slot].name])"""


def name_of(path: Path) -> str:
    return path.stem if path in TEMPLATES else f"{path.parent.name}-{path.stem}"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def as_the_page_loads_it(workflow: dict, object_info: dict) -> dict:
    """Values of widgets that a node lacks are dropped; on an older core the schedule has no curve, its last widget."""
    schedule = object_info["FlexIPGateSchedule"]["input"]
    for node in workflow["nodes"]:
        if node["type"] == "FlexIPGateSchedule" and "curve" not in schedule["optional"]:
            node["widgets_values"] = node["widgets_values"][: len(schedule["required"])]
    return workflow


def small_prompt(path: Path, object_info: dict, seed: int) -> dict:
    """As the page would queue it, but small; a seed of its own, so that nothing comes out of the server's cache."""
    prompt = to_prompt(as_the_page_loads_it(read(path), object_info), object_info)
    for kind in SMALL.keys() & {node["class_type"] for node in prompt.values()}:
        set_inputs(prompt, kind, **SMALL[kind])
    for node in prompt.values():
        if node["class_type"] in ("KSampler", "FlexIPSampler", "FlexIPAutoGate"):
            node["inputs"]["seed"] = seed
    return prompt


@pytest.mark.parametrize("path", WITH_MINI_MODELS, ids=name_of)
def test_workflow_runs(comfy: ComfyServer, path: Path) -> None:
    prompt = small_prompt(path, comfy.get("/object_info"), seed=1000 + FILES.index(path))
    before = len(comfy.log_text())
    run = comfy.run(prompt)
    words, count = SAID[path.stem]
    said = comfy.log_text()[before:]
    assert [text for text in words if text not in said] == [], said
    assert "WARNING" not in said
    assert "progress" in {message["type"] for message in run.messages}
    saved = [node_id for node_id, node in prompt.items() if node["class_type"] == "SaveImage"]
    files = [file for node_id in saved for file in run.outputs[node_id]["images"]]
    assert len(files) == count
    for file in files:
        assert (
            max(deviation for _, deviation in Image.open(io.BytesIO(comfy.view(file))).convert("RGB").getextrema()) > 20
        )


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "vue"])
def page(comfy: ComfyServer, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """One page for all workflows: each replaces the one before."""
    settings = comfy.base / "user" / "default" / "comfy.settings.json"
    before = settings.read_text()
    settings.write_text(json.dumps({**json.loads(before), "Comfy.VueNodes.Enabled": request.param}))
    page = browser.new_page(viewport={"width": 1800, "height": 1000}, locale="en-US")
    page.problems = []
    page.on(
        "console",
        lambda m: (
            m.type == "error"
            and not STOCK_ERRORS.search(m.text + m.location.get("url", ""))
            and page.problems.append(m.text)
        ),
    )
    page.on("pageerror", lambda error: page.problems.append(f"uncaught: {error}"))
    page.goto(comfy.url)
    page.wait_for_function(READY, timeout=60_000)
    yield page
    page.close()
    settings.write_text(before)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_workflow_opens_complete(page: Page, path: Path) -> None:
    """No node is unknown, no wire is lost, and nothing is marked as wrong."""
    workflow = read(path)
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_function("count => app.graph.nodes.length == count", arg=len(workflow["nodes"]))
    page.wait_for_timeout(300)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    wires = [
        [source, output, target, nodes[target]["inputs"][slot]["name"]]
        for _, source, output, target, slot, _ in workflow["links"]
    ]
    assert sorted(page.evaluate(WIRES)) == sorted(wires)
    assert (
        page.evaluate("app.graph.nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)")
        == []
    )
    if path in WITH_MINI_MODELS:  # the model files of the others are not here, which the page marks
        assert page.evaluate(MISSING) == []
        assert page.locator("[data-testid=error-overlay]").count() == 0
    if page.evaluate("LiteGraph.vueNodesMode"):
        assert page.locator("[data-node-id]").count() == len(nodes)
    if path not in SHIPPED_ONCE:
        assert_tidy(page)
    assert page.problems == []


@pytest.mark.parametrize("path", [path for path in TEMPLATES if path in WITH_MINI_MODELS], ids=name_of)
def test_workflow_is_still_tidy_after_a_run(page: Page, path: Path) -> None:
    """Nodes grow by the pictures and words that they show; in Nodes 2.0 more than on the canvas."""
    workflow = read(path)
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    for kind in SMALL.keys() & {node["type"] for node in workflow["nodes"]}:
        set_widgets(page, kind, **SMALL[kind])
    run(page)
    page.wait_for_timeout(1000)
    assert_tidy(page)


def assert_tidy(page: Page) -> None:
    """Nodes lie apart, and those of a group in its frame."""
    boxes = page.evaluate(BOXES)
    for (one, left, top, right, bottom), (other, *box) in itertools.combinations(boxes, 2):
        apart = right <= box[0] or box[2] <= left or bottom <= box[1] or box[3] <= top
        assert apart, f"{one} overlaps {other}"
    for title, left, top, right, bottom in page.evaluate(GROUPS):
        inside = [box for box in boxes if left <= box[1] < right and top <= box[2] < bottom]
        assert inside
        assert [name for name, *box in inside if box[2] > right or box[3] > bottom] == [], f"out of the frame {title}"
