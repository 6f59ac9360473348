"""FlexIP Sampler's sweep on its node: a click writes a picture's gate into the node that was swept, and a wipe compares it."""

from __future__ import annotations

import itertools

from playwright.sync_api import Page, expect
from server import ComfyServer
from test_page import browser, example_picture, make_small, open_template, page, run, set_widgets  # noqa: F401

VALUES = "app.graph.nodes.find(n => n.type == 'ApplyFlexIPGate').widgets.slice(0, 2).map(w => w.value)"
LOADED = "[...document.querySelectorAll('.flexip-sheet img')].every(i => i.complete && i.naturalWidth == 64)"
seeds = itertools.count(401)


def test_a_click_on_a_picture_writes_its_gate_and_shows_it_beside_strength_0(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_gate_sweep")
    make_small(page, seed=next(seeds))
    set_widgets(page, "FlexIPSampler", gates="0, 0.25, 1", strengths="0.5, 2")
    expect(page.locator(".flexip-sheet")).to_have_text("Wire a VAE: the pictures appear here.")
    assert run(page)[-1][0] == "execution_success"
    cells = page.locator(".flexip-sheet-cells button")
    names = [f"gate {gate}, strength {strength}" for strength in (0.5, 2) for gate in (0, 0.25, 1)]
    expect(cells).to_have_text(names)
    cells.nth(4).evaluate("cell => cell.click()")
    assert page.evaluate(VALUES) == [0.25, 2]
    wipe = page.locator(".flexip-sheet-wipe")
    expect(wipe).to_have_text("gate 0.25, strength 2strength 0")
    page.wait_for_function(LOADED)
    wipe.evaluate("""box => { const {left, width} = box.getBoundingClientRect();
        box.dispatchEvent(new PointerEvent('pointermove', {clientX: left + width / 4, bubbles: true})); }""")
    assert wipe.locator("img").last.evaluate("image => image.style.clipPath").startswith("inset(0px 0px 0px 25%")
    saved = page.evaluate("(async () => JSON.stringify([app.graph.serialize(), await app.graphToPrompt()]))()")
    assert "flexip_sheet" not in saved
    assert page.problems == []
