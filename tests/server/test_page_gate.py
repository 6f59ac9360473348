"""The gate's slider tells the truth: greyed where something else decides, and a live dial on request."""

from __future__ import annotations

import itertools

from playwright.sync_api import Page, expect
from server import ComfyServer
from test_page import browser, example_picture, make_small, open_template, page, run, set_widgets  # noqa: F401

GATE = "app.graph.nodes.find(n => n.type == 'ApplyFlexIPGate').widgets.find(w => w.name == 'gate')"
CURVE = "app.graph.nodes.find(n => n.type == 'FlexIPGateSchedule').widgets.find(w => w.name == 'curve')"
SET_MODE = "mode => { app.graph.nodes.find(n => n.type == 'FlexIPGateSchedule').mode = mode; }"
SUCCESSES = "window.seen.filter(e => e[0] == 'execution_success').length"
seeds = itertools.count(701)


def test_the_slider_is_greyed_while_the_sampler_sweeps_gates(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_gate_sweep")
    head = page.locator(".flexip-report-head")
    expect(head).to_have_text("gate is set by FlexIP Sampler")
    assert page.evaluate(f"{GATE}.disabled")
    make_small(page, seed=next(seeds))
    set_widgets(page, "FlexIPSampler", gates="")
    page.wait_for_function(f"!{GATE}.disabled")
    assert run(page)[-1][0] == "execution_success"
    expect(head).to_have_text("0 personalization ↔ 1 preservation")
    assert page.problems == []


def test_a_schedule_counts_unless_it_is_bypassed_and_its_curve_is_shown_where_it_counts(
    page: Page,
    comfy: ComfyServer,
) -> None:
    open_template(page, comfy, "flexip_style_over_time")
    page.wait_for_function(f"{GATE}.disabled")
    expect(page.locator(".flexip-report-head").first).to_have_text("gate is set by FlexIP Gate Schedule")
    page.wait_for_function(f"{CURVE}.hidden")
    set_widgets(page, "FlexIPGateSchedule", preset="curve")
    page.wait_for_function(f"!{CURVE}.hidden")
    page.evaluate(SET_MODE, 4)
    page.wait_for_function(f"!{GATE}.disabled")
    assert page.problems == []


def test_queue_on_change_makes_the_gate_a_live_dial(page: Page, comfy: ComfyServer) -> None:
    open_template(page, comfy, "flexip_basic")
    make_small(page, seed=next(seeds))
    assert run(page)[-1][0] == "execution_success"
    page.evaluate("document.querySelector('.flexip-live input').click()")
    page.wait_for_function(f"{SUCCESSES} == 2")  # what is set now, which is cached
    set_widgets(page, "ApplyFlexIPGate", gate=0.25)
    page.wait_for_function(f"{SUCCESSES} == 3")
    expect(page.locator(".flexip-report-line")).to_have_text("reference used, gate 0.25, 3 of 3 steps")
    page.evaluate("document.querySelector('.flexip-live input').click()")
    set_widgets(page, "ApplyFlexIPGate", gate=0.75)
    page.wait_for_timeout(1500)
    assert page.evaluate(SUCCESSES) == 3
    assert page.problems == []
