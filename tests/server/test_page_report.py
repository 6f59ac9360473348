"""What a node did in its last run stays on it as long as its pictures do, and leaves no trace in the workflow."""

from __future__ import annotations

import itertools

import pytest
from playwright.sync_api import Page, expect
from server import ComfyServer
from test_page import browser, example_picture, make_small, node, open_template, page, run, set_widgets  # noqa: F401
from test_page_warnings import INTO_SUBGRAPH

LINE = "reference used, gate 0.60, 3 of 3 steps"
TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker"
CAPTURE = f"({TRACKER}.captureCanvasState ?? {TRACKER}.checkState).call({TRACKER})"
STATE = f"""() => {{ {CAPTURE}; const workflow = app.extensionManager.workflow.activeWorkflow;
    return {{undo: {TRACKER}.undoQueue.length, modified: workflow.isModified,
             sizes: app.graph.nodes.filter(n => n.type != 'SaveImage').map(n => [...n.size])}}; }}"""
seeds = itertools.count(501)


def opened(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_basic")
    make_small(page, seed=next(seeds))


def test_a_report_survives_undo_and_another_tab_and_is_in_no_workflow(page: Page, comfy: ComfyServer) -> None:
    opened(page, comfy)
    line = page.locator(".flexip-report-line")
    expect(line).to_have_text("no run yet")
    sizes = page.evaluate(STATE)["sizes"]
    assert run(page)[-1][0] == "execution_success"
    expect(line).to_have_text(LINE)
    set_widgets(page, "KSampler", seed=next(seeds))
    before = page.evaluate(STATE)  # the page's own pictures have made their nodes larger
    assert before["sizes"] == sizes
    assert run(page)[-1][0] == "execution_success"
    assert page.evaluate(STATE) == before
    saved = page.evaluate("(async () => JSON.stringify([app.graph.serialize(), await app.graphToPrompt()]))()")
    assert "flexip_report" not in saved and "reference used" not in saved

    set_widgets(page, "ApplyFlexIPGate", gate=0.2)
    assert page.evaluate(STATE)["undo"] == before["undo"] + 1
    page.evaluate(f"{TRACKER}.undo()")
    page.wait_for_function("app.graph.nodes.find(n => n.type == 'ApplyFlexIPGate').widgets[0].value == 0.6")
    expect(line).to_have_text(LINE)
    page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    expect(line).to_have_count(0)
    page.evaluate("app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    expect(line).to_have_text(LINE)
    assert page.problems == []


def test_the_rest_is_folded_and_copied_with_versions(page: Page, comfy: ComfyServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened(page, comfy)
    set_widgets(page, "ApplyFlexIPGate", start_percent=0.9, end_percent=0.95)  # of three steps, none is between
    assert run(page)[-1][0] == "execution_success"
    expect(page.locator(".flexip-report-line")).to_have_text("⚠ reference not used: see the warning")
    page.locator(".flexip-report").get_by_text("details").click()
    panel = page.locator(".flexip-report-panel")
    expect(panel).to_contain_text("this gate changed nothing in this run")
    panel.get_by_text("copy").click()
    expect(panel).to_contain_text("copied")
    text = page.evaluate("navigator.clipboard.readText()")
    for words in ("Apply FlexIP Gate", "flexip_mini.safetensors", "FlexIP 0.", "ComfyUI ", "torch ", "page 1."):
        assert words in text
    page.keyboard.press("Escape")
    expect(panel).to_have_count(0)
    assert page.problems == []


def test_words_of_the_server_are_no_markup(page: Page, comfy: ComfyServer) -> None:
    opened(page, comfy)
    report = {name: ["<img src=x>"] for name in ("details", "warnings")} | {
        "line": "<b>bold</b>",
        "versions": "<i>1</i>",
    }
    detail = {"node": str(node(page, "ApplyFlexIPGate")), "output": {"flexip_report": report}, "merge": True}
    page.evaluate("detail => app.api.dispatchEvent(new CustomEvent('executed', {detail}))", detail)
    expect(page.locator(".flexip-report-line")).to_have_text("⚠ <b>bold</b>")
    page.locator(".flexip-report").get_by_text("details").click()
    assert page.locator(".flexip-report-panel :is(img, b, i)").count() == 0
    assert page.problems == []


@pytest.mark.long
def test_a_node_in_a_subgraph_has_its_own_report(page: Page, comfy: ComfyServer) -> None:
    opened(page, comfy)
    outer, inner = page.evaluate(INTO_SUBGRAPH, str(node(page, "ApplyFlexIPGate")))
    assert run(page)[-1][0] == "execution_success"
    page.evaluate("id => app.canvas.setGraph(app.graph.getNodeById(id).subgraph)", outer)
    expect(page.locator(".flexip-report-line")).to_have_text(LINE)
    assert page.problems == []
