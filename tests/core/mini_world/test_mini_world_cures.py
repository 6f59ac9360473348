"""The measures behind the mini world's cures, on curves whose answer is known; the whole run is in test_mini_world_gates.py."""

import pytest
import torch

from flexip_core.mini_world import cures, table

GATES = tuple(i / 10 for i in range(11))


def along(way):
    """(g,) how far the picture is -> features (g, 2, 2) of two pictures that move so."""
    return torch.stack([torch.stack([way, 0 * way], -1), torch.stack([0 * way, 2 * way], -1)], 1)


def test_evened_gates_are_where_the_picture_has_moved_equally_far():
    fast_first = torch.tensor(GATES).sqrt()
    evened = cures.evenly_spaced(along(fast_first), GATES)
    assert evened[0] == 0 and evened[-1] == pytest.approx(1)
    assert torch.tensor(evened).tolist() == pytest.approx([(i / 10) ** 2 for i in range(11)], abs=0.03)
    assert cures.evenly_spaced(along(torch.tensor(GATES)), GATES) == pytest.approx(GATES, abs=1e-6)


def test_a_jump_lies_in_one_part_of_its_interval_and_a_steep_slope_in_all():
    fine = torch.tensor(cures.finer(GATES), dtype=torch.float64)
    assert len(fine) == 101 and fine[::10].tolist() == pytest.approx(GATES)
    jump = cures.between(along((fine > 0.432).double()))
    slope = cures.between(along((fine - 0.4).clamp(0, 0.1)))
    assert jump == {"largest_part": pytest.approx(1), "median": pytest.approx(1), "jumps": 1.0}
    assert slope == {"largest_part": pytest.approx(0.1), "median": pytest.approx(0.1), "jumps": 0.0}


def test_what_a_cure_leaves_of_the_range_stands_beside_its_evenness():
    cure = {"per_image_feature_step": 2.0, "p99": 3.0, "whole_way": 1.0, "largest_step": 0.5, "identity_range": 0.4}
    cure |= {"identity_jump_share": 0.4}
    cure |= {"corner_copied_range": 0.9, "dino_i_range": 0.2}
    mode = {"evened_gates": [], "as it is": cure, "between": {"largest_part": 0.9, "median": 1.0, "jumps": 0.75}}
    better = {**cure, "per_image_feature_step": 1.0}
    found = {"x": {1: {"conflict": mode, "omit": mode}, 2: {"conflict": {**mode, "as it is": better}, "omit": mode}}}
    text = table.cures_markdown(found)
    assert "| as it is | conflict | 1.500 ± 0.707 |" in text and "| as it is | omit | 2.000 ± 0.000 |" in text
    assert "0.900 ± 0.000" in text and "jumps" in text and "0.750 ± 0.000" in text
