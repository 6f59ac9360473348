"""FlexIPStart in a real server and its page: the picture of the expert graph, nothing done twice, what is found on the node."""

from __future__ import annotations

import itertools

from conftest import REFERENCE
from playwright.sync_api import Page, expect
from server import ComfyServer, Run
from test_http import pictures, stock_prompt
from test_page import browser, example_picture, open_template, page, run, set_widgets  # noqa: F401

from flexip_core.untrained import mini

FLEXIP_FILE = "FlexIP file"
START = {"model": ["1", 0], "image": ["8", 0], "preset": FLEXIP_FILE, "gate": 0.6, "strength": 1.0}
ONE_NODE = """({picture, preset}) => { const graph = app.graph, one = kind => graph.nodes.find(n => n.type == kind);
    const start = LiteGraph.createNode('FlexIPStart'), apply = one('ApplyFlexIPGate'); graph.add(start); start.pos = [...apply.pos];
    const into = (node, name) => node.inputs.findIndex(input => input.name == name);
    one('CheckpointLoaderSimple').connect(0, start, into(start, 'model')); one('LoadImage').connect(0, start, into(start, 'image'));
    start.connect(0, one('KSampler'), into(one('KSampler'), 'model'));
    for (const kind of ['ApplyFlexIPGate', 'EncodeReference', 'LoadFlexIPAdapters']) graph.remove(one(kind));
    start.widgets.find(w => w.name == 'preset').value = preset;
    one('LoadImage').widgets[0].value = picture; }"""
WIDGETS = "Object.fromEntries(app.graph.nodes.find(n => n.type == 'FlexIPStart').widgets.map(w => [w.name, %s]))"
seeds = itertools.count(901)


def executed(result: Run) -> set[str]:
    return {message["data"]["node"] for message in result.messages if message["type"] == "executing"}


def test_it_is_the_expert_graph_and_a_new_gate_encodes_nothing(comfy: ComfyServer) -> None:
    prompt = stock_prompt(model=["9", 0], seed=next(seeds))
    prompt["8"] = {"class_type": "LoadImage", "inputs": {"image": REFERENCE}}
    prompt["9"] = {"class_type": "FlexIPStart", "inputs": START}
    result = comfy.run(prompt)
    [got] = pictures(comfy, {"7": result.outputs["7"]})
    [report] = [
        m["data"]["output"]["flexip_report"]
        for m in result.messages
        if m["type"] == "executed" and m["data"].get("merge")
    ]
    [told] = [m["data"]["node"] for m in result.messages if m["type"] == "executed" and m["data"].get("merge")]
    assert (
        told == "9" and report["files"] == [mini.MINI_FLEXIP] and report["line"].startswith("reference used, gate 0.60")
    )

    prompt["9"] = {"class_type": "FlexIPStart", "inputs": {**START, "gate": 0.3}}
    assert {node for node in executed(comfy.run(prompt)) if node and node.startswith("9.")} == {
        "9.0.0.3"
    }  # Apply FlexIP Gate

    files = {"preservation": mini.MINI_FLEXIP, "personalization": "auto", "clip_vision": "auto", "dino": "auto"}
    prompt["10"] = {"class_type": "LoadFlexIPAdapters", "inputs": files}
    prompt["11"] = {
        "class_type": "EncodeReference",
        "inputs": {"adapters": ["10", 0], "image": ["8", 0], "crop": "center"},
    }
    window = {"gate": 0.6, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    prompt["9"] = {"class_type": "ApplyFlexIPGate", "inputs": {"model": ["1", 0], "reference": ["11", 0], **window}}
    [expert] = pictures(comfy, {"7": comfy.run(prompt).outputs["7"]})
    assert got.tobytes() == expert.tobytes()


def test_on_the_page_it_says_what_its_ends_are_and_pins_what_it_found(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_basic")
    page.evaluate(ONE_NODE, {"picture": REFERENCE, "preset": "portrait"})
    head = page.locator(".flexip-report-head")
    expect(head).to_have_text("0 prompt ↔ 1 this face")
    page.wait_for_function(f"{WIDGETS % 'Boolean(w.hidden)'}.strength")
    set_widgets(page, "FlexIPStart", preset=FLEXIP_FILE)
    expect(head).to_have_text("0 prompt ↔ 1 subject")
    page.wait_for_function(f"!{WIDGETS % 'Boolean(w.hidden)'}.strength")
    set_widgets(page, "EmptyLatentImage", width=64, height=64)
    set_widgets(page, "KSampler", steps=3, seed=next(seeds))
    assert run(page)[-1][0] == "execution_success"
    expect(page.locator(".flexip-report-line")).to_have_text("reference used, gate 0.60, 3 of 3 steps")
    set_widgets(page, "KSampler", seed=next(seeds))
    assert run(page)[-1][0] == "execution_success"  # what is cached sends its pictures again
    expect(page.locator(".flexip-report-line")).to_have_text("reference used, gate 0.60, 3 of 3 steps")
    page.evaluate(
        "app.graph.nodes.find(n => n.type == 'FlexIPStart').widgets.find(w => w.name == 'pin files').callback()"
    )
    assert page.evaluate(WIDGETS % "w.value")["preservation"] == mini.MINI_FLEXIP
    saved = page.evaluate("app.graph.nodes.find(n => n.type == 'FlexIPStart').serialize().widgets_values")
    assert saved == [FLEXIP_FILE, 0.6, 1, "center", 0, 1, mini.MINI_FLEXIP, "auto", "auto"]
    assert page.problems == []
