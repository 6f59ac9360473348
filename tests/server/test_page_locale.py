"""The page in Chinese: our nodes' titles, labels and tooltips."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from conftest import REPO
from playwright.sync_api import Page, expect
from server import ComfyServer
from test_page import browser, example_picture, node, open_template, page  # noqa: F401

TEXTS = json.loads((REPO / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
IN_VUE = "LiteGraph.vueNodesMode"
ADD = (
    """kind => { const n = LiteGraph.createNode(kind); n.pos = [1100, 620]; app.graph.add(n); return String(n.id); }"""
)
# where an input or a widget is, on the screen
PLACE = """([id, name]) => { const n = app.graph.getNodeById(id), slot = n.inputs.findIndex(i => i.name == name);
    const widget = n.widgets.find(w => w.name == name), [x, y] = widget ? [n.pos[0] + 50, n.pos[1] + widget.y + 10] : n.getInputPos(slot);
    const [left, top] = app.canvas.convertOffsetToCanvas([x, y]), canvas = app.canvas.canvas.getBoundingClientRect();
    return [canvas.x + left, canvas.y + top]; }"""
TOOLTIPS = ".node-tooltip, [role=tooltip], .p-tooltip"


@pytest.fixture
def in_chinese(comfy: ComfyServer) -> Iterator[None]:
    settings = comfy.base / "user" / "default" / "comfy.settings.json"
    before = settings.read_text()
    settings.write_text(json.dumps({**json.loads(before), "Comfy.Locale": "zh"}))
    yield
    settings.write_text(before)


def expect_tooltip(page: Page, node_id: str, name: str) -> None:
    """The page must show the Chinese one when the mouse rests on an input or a widget."""
    kind = page.evaluate("id => app.graph.getNodeById(id).type", node_id)
    texts = TEXTS[kind]["inputs"][name.replace(".", "_")]
    if page.evaluate(IN_VUE):
        page.locator(f"[data-node-id='{node_id}']").get_by_text(texts.get("name", "reference_0"), exact=True).hover()
    else:
        x, y = page.evaluate(PLACE, [node_id, name])
        page.mouse.move(x + 3, y + 1)
        page.mouse.move(x, y)  # a move that ends there, not a jump
    expect(page.locator(TOOLTIPS).filter(has_text=texts["tooltip"]).first).to_be_visible()


def test_nodes_speak_chinese(in_chinese: None, page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_basic")
    apply, texts = str(node(page, "ApplyFlexIPGate")), TEXTS["ApplyFlexIPGate"]
    get = f"app.graph.getNodeById('{apply}')"
    assert page.evaluate(f"{get}.title") == texts["display_name"]
    for names in (
        page.evaluate(f"Object.fromEntries({get}.widgets.map(w => [w.name, w.label]))"),
        page.evaluate(f"Object.fromEntries({get}.inputs.map(i => [i.name, i.localized_name]))"),
    ):
        names = {
            name: shown for name, shown in names.items() if name != "flexip_report"
        }  # no input: the report has no name
        assert names == {name: texts["inputs"][name]["name"] for name in names}
    assert page.evaluate(f"{get}.outputs[0].localized_name") == texts["outputs"]["0"]["name"]

    if page.evaluate(IN_VUE):
        page.locator(f"[data-node-id='{apply}']").get_by_text(texts["display_name"], exact=True).wait_for()
    else:
        expect_tooltip(page, apply, "adapters")  # Vue nodes look for a socket's tooltip under its Chinese name, in vain
    expect_tooltip(page, apply, "gate")
    combine = page.evaluate(ADD, "FlexIPCombineReferences")
    expect_tooltip(page, combine, "references.reference_0")  # one of those that appear one by one
    assert page.problems == []
