"""The search of FlexIPAutoGate, on curves that are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexip_core.measuring import auto_gate

GATES = auto_gate.FIRST_ROUND
CURVES = {"line": lambda g: 0.2 + 0.6 * g, "late": lambda g: g**6, "step": lambda g: 1 / (1 + np.exp(-40 * (g - 0.4)))}


def search(curves, target):
    """As the node does it, with curves instead of pictures."""
    measure = lambda gates: np.array([[curve(g) for g in gates] for curve in curves])
    gates, scores = GATES, measure(GATES)
    finer = auto_gate.second_round(gates, scores, target)
    if finer:
        order = np.argsort((*gates, *finer))
        scores = np.concatenate([scores, measure(finer)], axis=1)[:, order]
        gates = tuple(np.array((*gates, *finer))[order].tolist())
    return auto_gate.find_gate(gates, scores, target)


@pytest.mark.parametrize("name", CURVES)
@given(share=st.floats(0.02, 0.98))
def test_the_gate_found_is_within_one_measured_step_of_the_smallest_that_reaches_the_target(name, share):
    curve = CURVES[name]
    target = curve(0.0) + share * (curve(1.0) - curve(0.0))
    true = next(g for g in np.linspace(0, 1, 10001) if curve(g) >= target - 1e-9)
    found = search([curve], target)
    assert found.reached and abs(found.gate - true) <= found.step + 1e-3
    assert found.step <= 0.0625 + 1e-9


def test_a_straight_line_is_found_exactly():
    assert search([CURVES["line"]], 0.5).gate == pytest.approx(0.5)


def test_a_target_that_no_gate_reaches_gives_gate_1_and_says_so():
    found = search([CURVES["line"]], 0.9)
    assert not found.reached and found.gate == 1.0


def test_a_target_that_every_gate_reaches_gives_gate_0():
    found = search([CURVES["line"]], 0.1)
    assert found.reached and found.gate == 0.0


def test_the_smallest_gate_is_taken_where_the_curve_falls_again():
    hump = lambda g: 1 - 4 * (g - 0.5) ** 2
    assert search([hump], 0.75).gate == pytest.approx(0.25)


@given(st.lists(st.floats(-0.15, 0.15), min_size=2, max_size=6))
def test_the_spread_of_the_noises_holds_every_single_crossing(shifts):
    found = search([lambda g, s=s: 0.2 + 0.6 * g + s for s in shifts], 0.5)
    singles = [(0.3 - s) / 0.6 for s in shifts]
    assert found.lowest == pytest.approx(min(singles), abs=1e-6)
    assert found.highest == pytest.approx(max(singles), abs=1e-6)
    assert found.lowest - 1e-6 <= found.gate <= found.highest + 1e-6 and found.never == 0


def test_a_noise_that_never_reaches_the_target_widens_the_range_to_1():
    found = search([lambda g: 0.2 + 0.6 * g, lambda g: 0.1 + 0.4 * g], 0.6)
    assert found.never == 1 and found.highest == 1.0


def test_a_share_of_the_range_counts_from_gate_0_to_the_best():
    scores = np.array([[0.2, 0.4, 0.8, 0.7]])
    assert auto_gate.as_score(0.0, scores) == pytest.approx(0.2)
    assert auto_gate.as_score(0.5, scores) == pytest.approx(0.5)
    assert auto_gate.as_score(1.0, scores) == pytest.approx(0.8)
