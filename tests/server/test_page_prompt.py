"""scripts/workflow.py makes the prompt that the real web page makes of the same file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import comfyui_workflow_templates
import pytest
from conftest import BROWSER_ARGUMENTS, REPO
from playwright.sync_api import Page, sync_playwright
from server import ComfyServer

from flexip_core.evaluation.workflow import to_prompt

STOCK = Path(comfyui_workflow_templates.get_asset_path("default", "default.json"))
FILES = [
    STOCK,
    *sorted((REPO / "workflows").glob("*.json")),
    *sorted((REPO / "tests" / "fixtures" / "shipped_workflows").glob("*.json")),
]
READY = "window.app && app.vueAppReady && app.graph && app.graph.nodes.length > 0"


@pytest.fixture(scope="module")
def page(comfy: ComfyServer, chromium: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_ARGUMENTS)
        page = browser.new_page()
        page.goto(comfy.url)
        page.wait_for_function(READY, timeout=60_000)  # the default workflow comes last and would replace ours
        yield page
        browser.close()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_same_prompt_as_the_page(comfy: ComfyServer, page: Page, path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_function("count => app.graph.nodes.length == count", arg=len(workflow["nodes"]))
    from_page = page.evaluate("app.graphToPrompt().then(result => result.output)")
    for node in from_page.values():
        del node["_meta"]  # the title, for people
    assert to_prompt(workflow, comfy.get("/object_info")) == from_page
