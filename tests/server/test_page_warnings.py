"""What FlexIP warns of in a run appears in the page: a badge on the node, and a notice; a clean run takes them away."""

from __future__ import annotations

import itertools
import json

import pytest
from conftest import REFERENCE, REPO
from playwright.sync_api import Page, expect
from server import ComfyServer, Run
from test_page import browser, example_picture, make_small, node, open_template, page, run, set_widgets  # noqa: F401

from flexip_core.evaluation.workflow import nodes_of, set_inputs, to_prompt

APPLY = "ApplyFlexIPGate"
LABEL = "⚠ FlexIP"
NOTHING = "this gate changed nothing in this run"
BETWEEN_STEPS = {"start_percent": 0.9, "end_percent": 0.95}  # of three steps, two are before it and one is behind
seeds = itertools.count(101)  # a run that was made before computes nothing, and warns of nothing
IN_VUE = "LiteGraph.vueNodesMode"
BADGE = """id => app.canvas.graph.getNodeById(id).badges.map(b => typeof b == 'function' ? b() : b).find(b => b.text == '⚠ FlexIP')"""
IS_DRAWN = f"id => ({BADGE})(id)?.boundingRect[2] > 0"
ON_SCREEN = f"""id => {{ const [x, y, width, height] = ({BADGE})(id).boundingRect, pos = app.canvas.graph.getNodeById(id).pos;
    const [left, top] = app.canvas.convertOffsetToCanvas([pos[0] + x + width / 2, pos[1] + y + height / 2]);
    const canvas = app.canvas.canvas.getBoundingClientRect(); return [canvas.x + left, canvas.y + top]; }}"""
INTO_SUBGRAPH = """id => { const {node} = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]));
    return [String(node.id), String(node.subgraph.nodes[0].id)]; }"""


def expect_badge(page: Page, node_id: str, wanted: bool) -> None:
    assert page.evaluate(f"id => Boolean(({BADGE})(id))", node_id) == wanted
    if page.evaluate(IN_VUE):
        expect(page.locator(f"[data-node-id='{node_id}']").get_by_text(LABEL)).to_have_count(int(wanted))
    elif wanted:
        page.wait_for_function(IS_DRAWN, arg=node_id)


def click_badge(page: Page, node_id: str) -> None:
    if page.evaluate(IN_VUE):
        page.locator(f"[data-node-id='{node_id}']").get_by_text(LABEL).click()
    else:
        page.mouse.click(*page.evaluate(ON_SCREEN, node_id))


def sample(page: Page, anew: bool = True) -> None:
    if anew:
        set_widgets(page, "KSampler", seed=next(seeds))
    assert run(page)[-1][0] == "execution_success"


def test_a_run_that_changes_nothing_marks_the_node_until_one_that_does(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_basic")
    make_small(page, seed=next(seeds))
    apply, notice = str(node(page, APPLY)), page.locator(".p-toast-message")
    set_widgets(page, APPLY, **BETWEEN_STEPS)
    sample(page)
    expect_badge(page, apply, True)
    expect(notice).to_have_count(1)
    expect(notice).to_contain_text("FlexIP: Apply FlexIP Gate")
    expect(notice).to_contain_text(NOTHING)

    page.locator(".p-toast-close-button").click()
    expect(notice).to_have_count(0)
    sample(page, anew=False)  # all of it is cached
    expect_badge(page, apply, True)
    click_badge(page, apply)
    expect(notice).to_contain_text(NOTHING)

    set_widgets(page, APPLY, start_percent=0.0)
    sample(page)
    expect_badge(page, apply, False)
    expect(notice).to_have_count(0)
    assert page.problems == []


def test_a_node_in_a_subgraph_marks_the_subgraph_too(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_basic")
    make_small(page, seed=next(seeds))
    set_widgets(page, APPLY, **BETWEEN_STEPS)
    sample(page)  # kept by ComfyUI; the node's new id must still count
    page.locator(".p-toast-close-button").click()
    outer, inner = page.evaluate(INTO_SUBGRAPH, str(node(page, APPLY)))
    sample(page)
    expect_badge(page, outer, True)
    expect(page.locator(".p-toast-message")).to_contain_text(NOTHING)
    page.evaluate("id => app.canvas.setGraph(app.graph.getNodeById(id).subgraph)", outer)
    expect_badge(page, inner, True)
    page.evaluate("app.canvas.setGraph(app.graph)")

    page.evaluate("id => { app.graph.getNodeById(id).mode = 4; }", outer)  # bypassed: no FlexIP in the run, no message
    sample(page)
    expect_badge(page, outer, False)
    expect(page.locator(".p-toast-message")).to_have_count(0)
    assert page.problems == []


def test_a_message_about_a_node_of_another_workflow_is_ignored(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_basic")
    sampler = str(node(page, "KSampler"))
    for node_id in (sampler, "999", f"{node(page, APPLY)}:1", "no id"):
        detail = {"node": node_id, "warnings": ["something"]}
        page.evaluate("detail => app.api.dispatchEvent(new CustomEvent('flexip.warnings', {detail}))", detail)
    expect_badge(page, sampler, False)
    expect_badge(page, str(node(page, APPLY)), False)
    assert page.locator(".p-toast-message").count() == 0
    assert page.problems == []


def messages(result: Run) -> list[dict]:
    return [message["data"] for message in result.messages if message["type"] == "flexip.warnings"]


@pytest.fixture
def prompt(comfy: ComfyServer) -> dict:
    """The shipped basic workflow, small."""
    workflow = json.loads((REPO / "workflows" / "flexip_basic.json").read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, comfy.get("/object_info"))
    set_inputs(prompt, "LoadImage", image=REFERENCE)
    set_inputs(prompt, "EmptyLatentImage", width=64, height=64)
    set_inputs(prompt, "KSampler", steps=3, seed=next(seeds))
    return prompt


def test_every_run_sends_its_warnings_even_when_there_are_none(comfy: ComfyServer, prompt: dict) -> None:
    [apply] = nodes_of(prompt, APPLY)
    assert messages(comfy.run(prompt)) == [{"node": apply, "warnings": []}]
    set_inputs(prompt, APPLY, **BETWEEN_STEPS)
    [message] = messages(comfy.run(prompt))
    assert message["node"] == apply and len(message["warnings"]) == 1 and message["warnings"][0].startswith(NOTHING)


@pytest.mark.parametrize("wrong", [0, 1])
def test_in_a_chain_each_node_is_told_what_it_did_itself(comfy: ComfyServer, prompt: dict, wrong: int) -> None:
    [first], [sampler] = nodes_of(prompt, APPLY), nodes_of(prompt, "KSampler")
    prompt["black"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    prompt["second"] = {"class_type": APPLY, "inputs": {**prompt[first]["inputs"], "model": [first, 0]}}
    prompt["off"] = {
        "class_type": APPLY,
        "inputs": {**prompt["second"]["inputs"], "model": ["second", 0], "strength": 0.0},
    }
    prompt[(first, "second")[wrong]]["inputs"]["mask"] = ["black", 0]
    prompt[sampler]["inputs"]["model"] = ["off", 0]
    result = comfy.run(prompt)
    found = {message["node"]: message["warnings"] for message in messages(result)}
    assert found.keys() == {first, "second", "off"}
    [warning] = found.pop((first, "second")[wrong])
    assert "mask is black everywhere, so this gate changed nothing" in warning
    assert list(found.values()) == [[], []]


def test_a_prompt_with_a_reference_says_when_the_model_has_no_gate(comfy: ComfyServer, prompt: dict) -> None:
    """The reminder of FlexIPConditioning, which has no run of its own to report."""
    [apply], [sampler] = nodes_of(prompt, APPLY), nodes_of(prompt, "KSampler")
    conditioning = prompt[sampler]["inputs"]["positive"]
    inputs = {"conditioning": conditioning, "gate": 0.6, "strength": 1.0}
    prompt["90"] = {
        "class_type": "FlexIPConditioning",
        "inputs": {**inputs, "reference": prompt[apply]["inputs"]["reference"]},
    }
    prompt[sampler]["inputs"]["positive"] = ["90", 0]
    with_gate = messages(comfy.run(prompt))
    assert not [message for message in with_gate if message["warnings"]]
    prompt[sampler]["inputs"]["model"] = prompt[apply]["inputs"]["model"]
    [message] = messages(comfy.run(prompt))
    assert message["node"] == "90" and "Put Apply FlexIP Gate" in message["warnings"][0]
