"""Measures of a sweep on curves whose answers are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flexip_core.measuring import smoothness

values = st.lists(st.integers(-5, 5), min_size=3, max_size=12)


@given(values)
def test_spearman_agrees_with_scipy_ties_included(curve):
    curve = torch.tensor(curve, dtype=torch.float64)
    if curve.unique().numel() == 1:
        assert smoothness.spearman(curve) == 0
    else:
        expected = stats.spearmanr(range(len(curve)), curve.numpy()).statistic
        assert smoothness.spearman(curve).item() == pytest.approx(expected, abs=1e-9)


def test_spearman_takes_each_case_by_itself():
    cases = torch.tensor([[0.0, 3.0, 1.0], [1.0, 2.0, 1.0], [2.0, 1.0, 1.0]])
    assert smoothness.spearman(cases).tolist() == pytest.approx([1, -1, 0])


def test_a_straight_line_has_the_smallest_jump_share_and_a_step_the_largest():
    line, step = torch.linspace(0.2, 0.9, 11), torch.tensor([0.2] * 6 + [0.9] * 5)
    assert smoothness.jump_share(line) == pytest.approx(0.1, abs=1e-5)
    assert smoothness.jump_share(step) == pytest.approx(1.0)
    assert smoothness.straightness(line) == pytest.approx(1)
    assert smoothness.straightness(step) < 0.8


def test_cases_that_flip_one_by_one_hide_in_the_mean_and_show_in_the_case_share():
    cases = (torch.arange(11.0)[:, None] > torch.arange(0.5, 10)[None]).float()
    assert smoothness.jump_share(cases.mean(1)) == pytest.approx(0.1, abs=1e-5)
    assert smoothness.case_jump_share(cases) == (1.0, 10)


def test_cases_that_do_not_move_are_left_out_of_the_case_share():
    cases = torch.stack([torch.linspace(0, 1, 11), torch.full((11,), 0.4)], dim=1)
    share, count = smoothness.case_jump_share(cases)
    assert (share, count) == (pytest.approx(0.1, abs=1e-5), 1)
    assert smoothness.case_jump_share(cases[:, 1:]) == (0.0, 0)


def test_step_ratios_are_one_for_even_motion_and_as_many_as_steps_for_one_jump():
    even = torch.linspace(0, 1, 11)[:, None, None].expand(11, 1, 3)
    jump = (torch.arange(11) > 6).float()[:, None, None].expand(11, 1, 3)
    features = torch.cat([even, jump], dim=1)
    assert smoothness.step_ratios(features).tolist() == pytest.approx([1, 10], abs=1e-3)
    assert smoothness.largest_step_at(jump).tolist() == [6]
