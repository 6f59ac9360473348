"""The pack in the real web page, in headless Chromium, with canvas nodes and with Vue nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BROWSER_ARGUMENTS, PACK, REFERENCE, REPO
from playwright.sync_api import Browser, Page, sync_playwright
from server import ComfyServer

READY = "window.app && app.vueAppReady && app.graph && app.graph.nodes.length > 0"
MISSING = "app.graph.nodes.filter(n => n.has_errors || !(n.type in LiteGraph.registered_node_types)).map(n => n.type)"
# The last: the page asks for a help page in its own language first, and takes ours when there is none.
STOCK_ERRORS = re.compile(
    r"/user\.css|ComfyApp graph accessed before initialization|huggingface\.co|missingModelDownload|/docs/\w+/en\.md"
)
EVENTS = [
    "progress",
    "progress_state",
    "executed",
    "execution_success",
    "execution_error",
    "b_preview",
]
WORKFLOWS = sorted(path.stem for path in (REPO / "workflows").glob("*.json"))
BOTH_SAMPLERS = ["flexip_basic", "flexip_gate_sweep"]  # run in the page; test_templates.py opens and runs all


@pytest.fixture(scope="module", autouse=True)
def example_picture(comfy: ComfyServer) -> None:
    """What every ComfyUI has in its input folder, and our templates name."""
    shutil.copyfile(comfy.base / "input" / REFERENCE, comfy.base / "input" / "example.png")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=[False, True], ids=["canvas", "vue"])
def page(comfy: ComfyServer, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    settings = comfy.base / "user" / "default" / "comfy.settings.json"
    before = settings.read_text()
    settings.write_text(json.dumps({**json.loads(before), "Comfy.VueNodes.Enabled": request.param}))
    context = browser.new_context(viewport={"width": 1800, "height": 1000}, locale="en-US")
    page = context.new_page()
    page.problems = []
    context.route(
        "**/*",
        lambda route: (
            route.continue_() if route.request.url.startswith((comfy.url, "data:", "blob:")) else route.abort()
        ),
    )
    page.on(
        "console",
        lambda m: (
            m.type == "error"
            and not STOCK_ERRORS.search(m.text + m.location.get("url", ""))
            and page.problems.append(f"{m.text} {m.location.get('url', '')}")
        ),
    )
    page.on("pageerror", lambda error: page.problems.append(f"uncaught: {error}"))
    yield page
    if folder := os.environ.get("FLEXIP_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / (re.sub(r"\W+", "_", request.node.name) + ".png"))
    context.close()
    settings.write_text(before)


def open_page(page: Page, comfy: ComfyServer, path: str = "") -> None:
    page.goto(comfy.url + path)
    page.wait_for_function(READY, timeout=60_000)
    page.evaluate(
        """names => { window.seen = []; for (const name of names) app.api.addEventListener(name, e => window.seen.push([name, e.detail])); }""",
        EVENTS,
    )


def open_template(page: Page, comfy: ComfyServer, name: str) -> None:
    open_page(page, comfy, f"/?template={name}&source={PACK}")
    page.wait_for_function("app.graph.nodes.some(n => n.type == 'ApplyFlexIPGate')", timeout=30_000)
    page.wait_for_timeout(500)


def node(page: Page, kind: str) -> int:
    return page.evaluate("kind => app.graph.nodes.find(n => n.type == kind).id", kind)


def set_widgets(page: Page, kind: str, **values: object) -> None:
    page.evaluate(
        """([kind, values]) => { const n = app.graph.nodes.find(n => n.type == kind);
        for (const [name, value] of Object.entries(values)) n.widgets.find(w => w.name == name).value = value; }""",
        [kind, values],
    )


def run(page: Page) -> list:
    """Queue the graph as the Run button does; the events up to success or error."""
    page.evaluate("window.seen.length = 0")
    assert page.evaluate("app.queuePrompt(0)"), page.evaluate("JSON.stringify(app.lastNodeErrors)")
    page.wait_for_function(
        "window.seen.some(e => e[0] == 'execution_success' || e[0] == 'execution_error')", timeout=120_000
    )
    page.wait_for_timeout(500)
    return page.evaluate("window.seen")


def make_small(page: Page, seed: int) -> None:
    set_widgets(page, "LoadImage", image=REFERENCE)
    set_widgets(page, "EmptyLatentImage", width=64, height=64)
    sampler = "FlexIPSampler" if page.evaluate("app.graph.nodes.some(n => n.type == 'FlexIPSampler')") else "KSampler"
    set_widgets(page, sampler, steps=3, seed=seed)  # a new seed each time: a cached run sends no progress


@pytest.mark.parametrize("name", BOTH_SAMPLERS)
def test_template_opens_and_runs_without_a_missing_node_or_an_error(page: Page, comfy: ComfyServer, name: str) -> None:
    open_template(page, comfy, name)
    assert page.evaluate(MISSING) == []
    assert page.locator("[data-testid=error-overlay]").count() == 0
    make_small(page, seed=abs(hash(name)) % 1000 + 7)
    events = run(page)
    assert events[-1][0] == "execution_success", events[-1]
    kinds = {kind for kind, _ in events}
    assert {"progress", "executed"} <= kinds
    encoder = str(node(page, "EncodeReference"))
    assert page.evaluate("id => app.nodeOutputs[id].images.length", encoder) == 1, "what the encoder saw is shown"
    apply = str(node(page, "ApplyFlexIPGate"))
    told = [detail for kind, detail in events if kind == "executed" and "flexip_report" in (detail["output"] or {})]
    report = next(detail["output"]["flexip_report"] for detail in told if detail["node"] == apply)
    assert report["line"].startswith("reference used") and not report["warnings"]
    assert page.problems == []


def test_sweep_shows_the_contact_sheet_and_the_report(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_gate_sweep")
    make_small(page, seed=3)
    set_widgets(page, "EmptyLatentImage", width=128, height=128)
    assert run(page)[-1][0] == "execution_success"
    sheet = page.evaluate("id => app.nodeOutputs[id].images[0]", str(node(page, "SaveImage")))
    assert sheet["filename"].startswith("gate_sweep") and sheet["subfolder"] == "flexip"
    report = page.evaluate("id => JSON.stringify(app.nodeOutputs[id])", str(node(page, "PreviewAny")))
    assert "gate 0, 0.25, 0.5, 0.75, 1" in report
    assert page.problems == []


def test_template_is_listed_in_the_browser(page: Page, comfy: ComfyServer) -> None:
    open_page(page, comfy)
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(PACK, exact=True).first.click()
    for name in WORKFLOWS:
        page.get_by_text(name).first.wait_for(timeout=10_000)
    page.get_by_text("flexip_basic").first.click()
    page.wait_for_function("app.graph.nodes.some(n => n.type == 'ApplyFlexIPGate')", timeout=30_000)
    assert page.evaluate(MISSING) == []
    assert page.problems == []


def test_help_page_of_each_node_opens_with_its_picture(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_gate_sweep")
    for kind, words in (
        ("ApplyFlexIPGate", "for every sampler"),
        ("FlexIPSampler", "same noise"),
        ("EncodeReference", "what they saw"),
        ("LoadFlexIPAdapters", "preservation"),
    ):
        page.evaluate(
            "kind => { app.canvas.selectNode(app.graph.nodes.find(n => n.type == kind)); app.canvas.setDirty(true, true); }",
            kind,
        )
        if not page.get_by_text(words).count():
            page.click("[data-testid=info-button]")
        page.get_by_text(words).first.wait_for(timeout=10_000)
        page.wait_for_function(
            "kind => [...document.images].some(i => i.src.endsWith(`/docs/${kind}.png`) && i.naturalWidth && i.checkVisibility())",
            arg=kind,
            timeout=10_000,
        )
    assert page.problems == []


def test_an_error_is_shown_at_its_node(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_gate_sweep")
    make_small(page, seed=5)
    set_widgets(page, "FlexIPSampler", gates="0, two")
    kind, detail = run(page)[-1]
    assert (
        kind == "execution_error" and detail["node_type"] == "FlexIPSampler" and "'two'" in detail["exception_message"]
    )
    page.wait_for_selector("[data-testid=error-overlay]")
