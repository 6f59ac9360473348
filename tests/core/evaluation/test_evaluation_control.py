"""Gate measures on sweeps whose answers are known by hand, and the mini world as their source."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexip_core.evaluation import control
from flexip_core.evaluation.control import AREA
from flexip_core.evaluation.curves import SECOND, Curves
from flexip_core.measuring import scores_file, smoothness
from flexip_core.measuring.scores_file import Row, Scores

MODELS = {"CLIP-T": "clip", "CLIP-I": "clip", "DINO-I": "dino"}
ELEVEN = tuple(i / 10 for i in range(11))
LINE = torch.linspace(0, 1, 11, dtype=torch.float64)
STEP = (LINE > 0.45).double()
HEADER = {"knob": "gate", "steps": 20, "cfg": 7.0, "seeds": [1, 2]}


def sweep_of(
    subject: torch.Tensor,
    text: torch.Tensor | None = None,
    gates: tuple[float, ...] = ELEVEN,
    features: torch.Tensor | None = None,
    **changes,
) -> Scores:
    """Curves (g, n); CLIP-I moves as DINO-I does. CLIP-T falls by as much unless given; features (g, n, f)."""
    subject = subject[:, None] if subject.dim() == 1 else subject
    text = 1 - subject if text is None else text.expand_as(subject.T).T if text.dim() == 1 else text
    rows = tuple(
        Row(f"subject {case}", "object", "a prompt", 0, gate, {"CLIP-T": t, "CLIP-I": d, "DINO-I": d})
        for gate, ts, ds in zip(gates, text.tolist(), subject.tolist(), strict=True)
        for case, (t, d) in enumerate(zip(ts, ds, strict=True))
    )
    flat = None if features is None else features.flatten(0, 1).float()
    return dataclasses.replace(Scores("FlexIP", HEADER, MODELS, {}, rows, flat), **changes)


def values(result: control.Control) -> dict[tuple[str, str], float | None]:
    return {(m.name, m.column): m.value for m in result.measures}


def measure(result: control.Control, name: str, column: str) -> control.Measure:
    (found,) = [m for m in result.measures if m.name == name and m.column == column]
    return found


LIPSCHITZ = "Lipschitz: largest / mean DINO step, mean over cases"
JUMP, CASE_JUMP = "largest jump share, mean curve", "largest jump share, mean over cases"
MONOTONE, CASE_MONOTONE = "monotone, mean curve", "monotone, mean over cases"
LINEAR = "linearity, R² of the mean curve"


@pytest.mark.parametrize("points", [11, 21, 101])
def test_a_straight_line_is_as_even_as_can_be_on_any_even_grid(points):
    line = torch.linspace(0, 1, points, dtype=torch.float64)
    features = line[:, None, None].expand(points, 2, 3)
    result = control.control(sweep_of(line[:, None].expand(-1, 2), gates=tuple(line.tolist()), features=features))
    for column in ("CLIP-I", "DINO-I", "CLIP-T"):
        assert measure(result, JUMP, column).value == pytest.approx(0.1)
        assert measure(result, CASE_JUMP, column).value == pytest.approx(0.1)
        assert measure(result, LINEAR, column).value == pytest.approx(1)
    for column in ("CLIP-I", "DINO-I", "-CLIP-T"):
        assert measure(result, MONOTONE, column).value == measure(result, CASE_MONOTONE, column).value == 1
    assert measure(result, LIPSCHITZ, "").value == pytest.approx(1, abs=1e-5)
    assert measure(result, "usable range: gain", "DINO-I").value == pytest.approx(0.8)
    assert measure(result, "usable range: loss", "CLIP-T").value == pytest.approx(0.8)
    assert all(m.met in (True, None) for m in result.measures)


def test_one_step_takes_the_whole_way_and_ten_times_the_mean():
    features = STEP[:, None, None].expand(11, 1, 3)
    result = control.control(sweep_of(STEP, features=features))
    jump = measure(result, JUMP, "DINO-I")
    assert jump.value == pytest.approx(1) and jump.met is False and "gate 0.4 to 0.5" in jump.note
    assert measure(result, LIPSCHITZ, "").value == pytest.approx(10, abs=1e-3)
    assert measure(result, LIPSCHITZ, "").met is False
    assert measure(result, LINEAR, "DINO-I").value == pytest.approx(0.743, abs=0.02)
    # ranks: six values share one rank, five another
    assert measure(result, MONOTONE, "DINO-I").value == pytest.approx(math.sqrt(3 * 5 * 6 / (11**2 - 1)))


def test_flips_of_single_cases_hide_in_the_mean_curve_and_show_in_the_cases():
    flips = (torch.arange(11.0)[:, None] > torch.arange(0.5, 10)[None]).double()
    result = control.control(sweep_of(flips, features=flips[..., None]))
    assert measure(result, JUMP, "DINO-I").value == pytest.approx(0.1) and measure(result, JUMP, "DINO-I").met
    hidden = measure(result, CASE_JUMP, "DINO-I")
    assert hidden.value == pytest.approx(1) and hidden.met is None and "10 of 10 cases" in hidden.note
    assert measure(result, LIPSCHITZ, "").value == pytest.approx(10, abs=1e-3)


def test_cases_below_the_floor_have_no_share_and_are_counted():
    cases = torch.stack([LINE, 0.04 * STEP + 0.3], dim=1)
    found = measure(control.control(sweep_of(cases)), CASE_JUMP, "DINO-I")
    assert found.value == pytest.approx(0.1) and "1 of 2 cases" in found.note
    still = control.control(sweep_of(0.04 * cases))
    assert measure(still, CASE_JUMP, "DINO-I").value is None


def test_a_flat_curve_passes_no_line_by_having_no_way():
    result = control.control(sweep_of(torch.full((11, 2), 0.4, dtype=torch.float64)))
    assert measure(result, JUMP, "DINO-I").value is None and measure(result, JUMP, "DINO-I").met is None
    assert measure(result, LINEAR, "DINO-I").value is None and measure(result, AREA, "CLIP-T, DINO-I").value is None
    assert measure(result, MONOTONE, "DINO-I").value == 0 and measure(result, MONOTONE, "DINO-I").met is False
    json.dumps(control.to_json(result), allow_nan=False)


def test_the_usable_range_is_interpolated_where_the_grid_has_no_tenth():
    gates = (0.0, 0.2, 0.5, 1.0)
    result = control.control(sweep_of(torch.tensor([0.0, 0.4, 0.5, 1.0]), gates=gates))
    gain = measure(result, "usable range: gain", "DINO-I")
    assert gain.value == pytest.approx(0.9 - 0.2) and "gate 0.1 to 0.9" in gain.note
    assert "0.5 of the sweep apart" in control.markdown(result)


def test_what_was_not_measured_says_why():
    missing = {"DINO-I": "The file dino_vits16.safetensors is missing."}
    scores = sweep_of(LINE, missing=missing)
    rows = tuple(dataclasses.replace(row, scores={"CLIP-T": 0.2, "CLIP-I": 0.3}) for row in scores.rows)
    result = control.control(dataclasses.replace(scores, rows=rows))
    for name in (JUMP, MONOTONE, LINEAR, "usable range: gain"):
        assert measure(result, name, "DINO-I").note == missing["DINO-I"]
    assert "features" in measure(result, LIPSCHITZ, "").note
    assert measure(result, AREA, "CLIP-T, DINO-I").value is None and "DINO-I" not in result.curves
    assert missing["DINO-I"] in control.markdown(result)
    with pytest.raises(ValueError, match="cannot be refined"):
        control.refinement(dataclasses.replace(scores, rows=rows))


def test_the_second_set_of_columns_is_measured_alike():
    scores = sweep_of(LINE)
    second = dict(zip(("CLIP-T", "CLIP-I", "DINO-I"), SECOND.names(), strict=True))
    rows = tuple(dataclasses.replace(row, scores={second[k]: v for k, v in row.scores.items()}) for row in scores.rows)
    result = control.control(dataclasses.replace(scores, rows=rows), SECOND)
    assert measure(result, JUMP, "DINO-I (DINOv2)").value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows: rows[:-1], r"lacks subject 1, 'a prompt', image 0 at 1\."),
        (lambda rows: (*rows, rows[0]), "1 pictures twice"),
        (lambda rows: tuple(r for r in rows if r.gate in (0.0, 1.0)), "at 2 gates"),
        (lambda rows: tuple(dataclasses.replace(r, gate=None) for r in rows), "at 0 gates"),
        (lambda rows: (*rows[:-1], dataclasses.replace(rows[-1], scores={})), "no CLIP-T of 1 pictures"),
    ],
)
def test_a_sweep_that_is_not_whole_is_refused(spoil, said):
    scores = sweep_of(LINE[:, None].expand(-1, 2))
    with pytest.raises(ValueError, match=said):
        control.control(dataclasses.replace(scores, rows=spoil(scores.rows)))


def test_hypervolume_of_a_staircase():
    stairs = [(1.0, 0.25), (0.5, 0.5), (0.25, 1.0)]
    assert control.hypervolume(stairs) == pytest.approx(0.25 + 0.125 + 0.125)
    assert control.hypervolume([*stairs, (0.4, 0.4), (0.5, 0.5)]) == pytest.approx(0.5)  # dominated, or there already
    assert control.hypervolume([*stairs, (1.0, 1.0)]) == pytest.approx(1)
    assert control.hypervolume(stairs, (0.25, 0.25)) == pytest.approx(0.25 * 0.25)
    assert control.hypervolume([(0.0, 5.0), (5.0, -1.0)]) == 0


def test_the_area_of_a_straight_trade_is_that_of_its_stairs():
    result = control.control(sweep_of(LINE))
    area = measure(result, AREA, "CLIP-T, DINO-I")
    assert area.value == pytest.approx(0.45)  # ten stairs below the diagonal
    assert "reference point (0.0000, 0.0000)" in area.note


def test_a_refinement_is_21_gates_over_the_largest_jump_ends_included():
    gates = control.refinement(sweep_of(STEP))
    assert len(gates) == 19
    whole = [0.4, *gates, 0.5]
    assert all(b - a == pytest.approx(0.005) for a, b in itertools.pairwise(whole))
    assert gates[0] == 0.405 and gates[-1] == 0.495  # as a person would write them


def by_gate(curve, gates: tuple[float, ...]) -> Scores:
    return sweep_of(torch.tensor([curve(g) for g in gates], dtype=torch.float64), gates=gates)


def test_a_refined_cliff_stays_a_cliff_and_a_refined_slope_shows_that_it_is_one():
    def cliff(gate):
        return float(gate > 0.447)

    def slope(gate):
        return min(max((gate - 0.4) / 0.1, 0.0), 1.0)

    for curve, alone, where in ((cliff, 1.0, "gate 0.445 to 0.45"), (slope, 0.05, "gate 0.4")):
        coarse = by_gate(curve, ELEVEN)
        fine = by_gate(curve, control.refinement(coarse))
        both = control.refined(coarse, fine)
        assert len(both.gates) == 30 and both.header["refined"] == list(control.refinement(coarse))
        assert both.header["gates"] == list(both.gates)
        found = measure(control.control(both), JUMP, "DINO-I")
        assert found.value == pytest.approx(1)  # within a tenth of the gate, both
        assert f"in the refined stretch at most {alone:.3f} at once, {where}" in found.note


def test_a_straight_line_stays_straight_when_it_is_refined():
    coarse = by_gate(lambda g: 0.2 + 0.5 * g, ELEVEN)
    fine = by_gate(lambda g: 0.2 + 0.5 * g, (0.4, *control.refinement(coarse), 0.5))  # ends once more: they are dropped
    result = control.control(control.refined(coarse, fine))
    assert len(result.gates) == 30
    assert measure(result, JUMP, "DINO-I").value == pytest.approx(0.1)
    assert measure(result, LINEAR, "DINO-I").value == pytest.approx(1)


def test_features_are_put_together_with_their_rows():
    g = torch.Generator().manual_seed(0)
    whole = torch.rand(30, 3, 4, generator=g)
    coarse_gates, fine_gates = ELEVEN, control.refinement(sweep_of(STEP))
    order = sorted([*coarse_gates, *fine_gates])
    parts = [
        sweep_of(
            torch.rand(len(gates), 3, generator=g), gates=gates, features=whole[[order.index(gate) for gate in gates]]
        )
        for gates in (coarse_gates, fine_gates)
    ]
    curves = Curves(control.refined(*parts))
    assert torch.equal(curves.features(), whole)
    assert curves.places[[0, -1]].tolist() == [0, 10]
    assert control.refined(parts[0], dataclasses.replace(parts[1], features=None)).features is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "IP-Adapter"}, "different methods"),
        ({"columns": {**MODELS, "DINO-I": "dinov2"}}, "different models"),
        ({"header": {**HEADER, "steps": 30}}, "steps 20 of FlexIP, 30"),
        ({"rows": sweep_of(LINE[:, None].expand(-1, 2)).rows}, "different cases"),
    ],
)
def test_a_fine_sweep_of_something_else_is_refused(change, said):
    coarse = sweep_of(LINE)
    with pytest.raises(ValueError, match=said):
        control.refined(coarse, dataclasses.replace(coarse, **change))


def test_two_sweeps_are_measured_by_one_box_and_the_larger_area_wins():
    ours = sweep_of(LINE, torch.ones(11))  # keeps the text all the way
    theirs = sweep_of(0.5 * LINE, 1 - LINE, method="IP-Adapter", header={**HEADER, "knob": "scale"})
    result = control.compare(ours, theirs)
    assert result.ours.box == result.baseline.box == control.Box((0.0, 1.0), (0.0, 1.0))
    ours_area, their_area = (measure(r, AREA, "CLIP-T, DINO-I") for r in (result.ours, result.baseline))
    assert ours_area.value == pytest.approx(1) and their_area.value == pytest.approx(0.225)
    assert ours_area.met is True and their_area.met is None
    assert measure(result.ours, CASE_JUMP, "DINO-I").met is False  # 0.1 is not lower than 0.1
    text = control.markdown(result)
    assert "| area under the front | CLIP-T, DINO-I | 1.000 | 0.225 | larger than baseline | yes |  |" in text
    assert "scale 0 to 1" in text and text.count("reference point (0.0000, 0.0000)") == 1
    swapped = control.compare(theirs, ours)
    assert measure(swapped.ours, AREA, "CLIP-T, DINO-I").met is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": sweep_of(LINE[:, None].expand(-1, 3)).rows}, "different cases .1 are in one only"),
        ({"rows": sweep_of(LINE[:10, None].expand(-1, 2), gates=ELEVEN[:10]).rows}, "11 and 10 gates"),
        ({"columns": {**MODELS, "CLIP-T": "clip L/14"}}, "different models behind CLIP-T .clip; clip L/14"),
    ],
)
def test_what_is_not_on_equal_terms_is_not_compared(change, said):
    ours = sweep_of(LINE[:, None].expand(-1, 2))
    with pytest.raises(ValueError, match=said) as caught:
        control.compare(ours, dataclasses.replace(ours, method="IP-Adapter", **change))
    assert "\n" not in str(caught.value)


def test_other_sampling_is_told_beside_the_table():
    ours = sweep_of(LINE)
    result = control.compare(ours, dataclasses.replace(ours, method="IP-Adapter", header={**HEADER, "cfg": 3.0}))
    assert "Not on equal terms: cfg 7.0 of FlexIP, 3.0 of IP-Adapter." in control.markdown(result)


def test_the_table_shows_lines_and_no_verdict_where_there_is_none():
    text = control.markdown(control.control(sweep_of(LINE)))
    assert "| monotone, mean curve | -CLIP-T | 1.000 | >= 0.95 | yes |  |" in text
    assert "| linearity, R² of the mean curve | DINO-I | 1.000 | report |  |  |" in text
    assert "| usable range: loss | CLIP-T | 0.800 | gain >> loss |  |" in text
    assert "DINO-I: dino" in text and "11 gates, gate 0 to 1; 1 cases of 1 subjects" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_a_sweep_measures_the_same_after_it_was_written_and_read(tmp_path):
    g = torch.Generator().manual_seed(0)
    scores = sweep_of(torch.rand(11, 4, generator=g), features=torch.rand(11, 4, 5, generator=g))
    scores_file.write(tmp_path / "scores.json", scores)
    assert control.control(scores_file.read(tmp_path / "scores.json")) == control.control(scores)


grids = st.integers(2, 5).flatmap(
    lambda cases: st.lists(
        st.lists(st.integers(0, 20).map(lambda v: v / 20), min_size=cases, max_size=cases), min_size=11, max_size=11
    )
)


@given(grids, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(grid, chance):
    subject = torch.tensor(grid, dtype=torch.float64)
    scores = sweep_of(subject, features=subject[..., None])
    order = list(range(len(scores.rows)))
    chance.shuffle(order)
    shuffled = dataclasses.replace(scores, rows=tuple(scores.rows[i] for i in order), features=scores.features[order])
    assert control.control(shuffled) == control.control(scores)


@given(grids)
def test_every_case_twice_changes_nothing_but_the_counts(grid):
    subject = torch.tensor(grid, dtype=torch.float64)
    scores = sweep_of(subject, features=subject[..., None])
    again = tuple(dataclasses.replace(row, image=1) for row in scores.rows)
    twice = dataclasses.replace(
        scores, rows=scores.rows + again, features=torch.cat([scores.features, scores.features])
    )
    once, doubled = values(control.control(scores)), values(control.control(twice))
    for key, value in once.items():
        if "percentile" not in key[0]:  # between the two largest cases, there are now others
            assert doubled[key] == (value if value is None else pytest.approx(value, abs=1e-5)), key


@given(
    st.lists(st.integers(0, 20).map(lambda v: v / 20), min_size=11, max_size=11),
    st.lists(st.tuples(st.integers(1, 99), st.integers(0, 20)), min_size=1, max_size=6, unique_by=lambda pair: pair[0]),
)
def test_looking_closer_never_makes_a_jump_smaller(curve, added):
    """Every step between the tenths is still one on the finer grid."""
    points = {i * 10: value for i, value in enumerate(curve)}
    finer = {**{at: value / 20 for at, value in added}, **points}
    values = torch.tensor([finer[at] for at in sorted(finer)], dtype=torch.float64)
    places = torch.tensor(sorted(finer), dtype=torch.float64) / 10
    coarse = torch.tensor(curve, dtype=torch.float64)
    if coarse[0] != coarse[-1]:
        assert smoothness.jump_share(values, places) >= smoothness.jump_share(coarse) - 1e-9
    ratios = smoothness.step_ratios(values[:, None, None], places), smoothness.step_ratios(coarse[:, None, None])
    assert ratios[0].item() >= ratios[1].item() - 1e-9
    assert smoothness.steps(values, places)[1].max() <= values.max() - values.min() + 1e-9


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_hypervolume_is_the_share_of_points_that_are_beaten(points):
    side = torch.arange(0.5, 200) / 200
    grid = torch.cartesian_prod(side, side)
    beaten = torch.stack([(grid <= torch.tensor(point)).all(1) for point in points]).any(0)
    assert control.hypervolume(points) == pytest.approx(beaten.double().mean().item(), abs=0.02)


# The mini world ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_world():
    """The shipped base and adapters; the judge and the text side of the CLIP stand-in are not shipped, so untrained here."""
    from flexip_core.encoders.towers import load_tower
    from flexip_core.mini_world import encoders, files, judge, measure, task

    torch.manual_seed(0)
    judging, clip = judge.Judge().eval(), encoders.untrained(0).eval()
    clip.tower.model.load_state_dict(files.part(files.read_tensors(files.WEIGHTS / files.CLIP_FILE), "visual."))
    dino = load_tower(encoders.DINO, files.WEIGHTS / files.DINO_FILE)
    return task.load_world(files.WEIGHTS), measure.Instruments(judging, clip, dino)


def test_a_trained_run_of_the_mini_world_becomes_scores_that_can_be_measured(mini_world, tmp_path):
    from flexip_core.mini_world import files, measure, scored

    base, tools = mini_world
    setup = measure.Setup(cases=4, gates=(0.0, 0.5, 1.0), steps=2)
    scores = scored.score_run(base, tools, files.WEIGHTS / files.ADAPTERS, "outputs", setup, "conflict")
    assert scores.gates == (0.0, 0.5, 1.0) and len(scores.rows) == 12 and len(scores.subjects) == 4
    assert set(scores.columns) == {"CLIP-T", "CLIP-I", "DINO-I"} and all(
        "mini world" in v for v in scores.columns.values()
    )
    assert {"CLIP-IQA", "Aesthetic"} == set(scores.missing)
    assert scores.header["knob"] == "gate" and scores.header["steps"] == 2 and len(scores.header["checkpoint"]) == 64
    scores_file.write(tmp_path / "mini.json", scores)
    result = control.control(scores_file.read(tmp_path / "mini.json"))
    assert all(m.value is not None for m in result.measures if not m.name.startswith("largest jump"))
    assert len(control.refinement(scores)) == 19


def test_rows_and_features_keep_case_and_gate_together(mini_world):
    from flexip_core.files.checkpoint import load_checkpoint
    from flexip_core.mini_world import files, measure, runs, scored, world

    base, tools = mini_world
    setup = measure.Setup(cases=4, gates=(0.0, 0.4, 1.0), steps=2)
    network = load_checkpoint(files.WEIGHTS / files.ADAPTERS).float()
    sweep = measure.gate_sweep(base, network, "conflict", tools, setup)
    scores = scored.to_scores(sweep, setup, "conflict", "FlexIP", {"commit": "abc"})
    tests, curves = setup.tests(), Curves(scores)
    for column, name in scored.COLUMNS.items():
        for case in range(4):
            key = (f"{world.WORDS['shape'][tests.seen.shape[case]]} {case:03d}",)
            at = [c[:1] for c in curves.cases].index(key)
            assert torch.allclose(curves.of(column)[:, at].float(), sweep.scores[name][:, case])
            assert torch.equal(curves.features()[:, at], sweep.features[:, case])
            assert curves.cases[at][1] == world.in_words(tests.prompts("conflict")[case])
    assert scores.header["commit"] == "abc" and scores.header["cfg"] == setup.cfg
    assert scores.header["seeds"] == [setup.noise_seed]
    ip = scored.score_run(base, tools, files.WEIGHTS / files.ADAPTERS, runs.BASELINE, setup, "conflict")
    assert ip.header["knob"] == "scale"
    assert "scale 0 to 1" in control.markdown(control.compare(scores, ip))
