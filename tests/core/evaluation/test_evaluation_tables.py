"""Means, intervals over subjects, and the tables that are printed from them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexip_core.evaluation.published import COLUMNS, NOT_COMPARABLE, mean_ranks, table1
from flexip_core.evaluation.statistics import by_category, by_gate, difference, interval, real_against_real, summarize
from flexip_core.evaluation.tables import compare, to_csv, to_json, to_markdown, write_tables
from flexip_core.measuring.scores_file import Row, Scores

MODELS = {column: f"model of {column}" for column in COLUMNS}
HEADER = {"commit": "abc123", "steps": 20, "cfg": 5.0, "seeds": [0, 1], "benchmark": "DreamBench"}


def row(subject: str, score: float, image: int = 0, category: str = "live", gate: float | None = None) -> Row:
    return Row(subject, category, "00", image, gate, {"DINO-I": score})


def run(
    method: str,
    level: float = 0.5,
    *,
    gates: tuple[float | None, ...] = (None,),
    columns: tuple[str, ...] = COLUMNS,
    subjects: int = 4,
    header: Mapping[str, object] | None = None,
    models: Mapping[str, str] = MODELS,
    missing: Mapping[str, str] | None = None,
) -> Scores:
    """Subject n scores level + n / 100 (and the gate / 10) in every column."""
    rows = tuple(
        Row(f"s{n}", "live" if n % 2 else "object", f"{case:02d}", 0, gate,
            {column: level + n / 100 + (gate or 0) / 10 for column in columns})
        for gate in gates for n in range(subjects) for case in range(2)
    )  # fmt: skip
    return Scores(method, header or HEADER, {c: models[c] for c in columns}, missing or {}, rows)


# statistics ------------------------------------------------------------------------------------------------------------


def test_mean_and_spread_are_over_pictures() -> None:
    summary = summarize([row("a", 1.0), row("a", 2.0, 1), row("b", 6.0)], "DINO-I")
    assert (summary.mean, summary.std, summary.images, summary.subjects) == (3.0, pytest.approx(7**0.5), 3, 2)


def test_a_difference_is_paired_so_hard_subjects_cancel() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 1, 12)  # subjects differ far more than the methods
    lead = generator.normal(0.05, 0.02, 12)
    ours = [row(f"s{n:02d}", hard[n] + lead[n]) for n in range(12)]
    theirs = [row(f"s{n:02d}", hard[n]) for n in range(12)]
    found = difference(ours, theirs[::-1], "DINO-I")
    assert found.mean == pytest.approx(lead.mean()) and found.clear
    assert (found.low, found.high) == pytest.approx(interval(lead, np.ones(12)))  # of the differences themselves
    alone = summarize(ours, "DINO-I")
    assert alone.high - alone.low > 10 * (found.high - found.low)
    turned = difference(theirs, ours, "DINO-I")
    assert (turned.mean, turned.low, turned.high) == pytest.approx((-found.mean, -found.high, -found.low), abs=1e-12)
    with pytest.raises(ValueError, match="needs the same pictures of both methods"):
        difference(ours, theirs[1:], "DINO-I")


def test_two_runs_get_their_difference_and_columns_that_do_not_compare_are_not_placed() -> None:
    found = compare([run("A", 0.6), run("B", 0.5)])
    (one,) = found.differences
    assert (one.first, one.second) == ("A", "B") and one.scores["DINO-I"].mean == pytest.approx(0.1)
    assert "| A − B | **+0.100 [+0.100, +0.100]** |" in to_markdown(found)
    assert found.placed_by == COLUMNS and found.table_1

    models = {**MODELS, "CLIP-I": f"small, {NOT_COMPARABLE} with scores by CLIP"}
    some = compare([run("A", 0.6, models=models), run("B", 0.5, models=models)])
    assert some.ranked == COLUMNS and "CLIP-I" not in some.placed_by and some.table_1
    assert "CLIP-I was scored with files that do not compare" in to_markdown(some)
    table = to_markdown(some).split("## In the paper's Table 1")[1]
    ours = next(line for line in table.splitlines() if "A (this run)" in line).split("|")
    assert [ours[4 + i].strip() for i, c in enumerate(COLUMNS)].count("–") == 1
    none = compare([run("A", models={c: f"x, {NOT_COMPARABLE}" for c in COLUMNS})])
    assert none.ranked == COLUMNS and not none.placed_by and not none.table_1
    assert "In the paper's Table 1" not in to_markdown(none)


def test_one_subject_has_no_interval_and_one_picture_no_spread() -> None:
    summary = summarize([row("a", 1.0), row("a", 2.0, 1)], "DINO-I")
    assert (summary.low, summary.high) == (None, None) and summary.std is not None
    assert summarize([row("a", 1.0)], "DINO-I").std is None


@pytest.mark.parametrize("score", [float("nan"), None])
def test_a_picture_without_the_score_is_named_instead_of_left_out(score: float | None) -> None:
    with pytest.raises(ValueError, match="b, prompt 00, image 0 has no DINO-I"):
        summarize([row("a", 1.0), row("b", score)], "DINO-I")
    with pytest.raises(ValueError, match="no pictures"):
        summarize([], "DINO-I")


@pytest.mark.parametrize("sums, counts", [([1.0, 12.0, 3.0, 0.5], [1, 4, 6, 2]), ([0.1, 0.4, 0.9, 1.6], [1, 1, 1, 1])])
def test_the_interval_is_that_of_all_equally_likely_resamples_of_subjects(sums: list, counts: list) -> None:
    sums, counts = np.array(sums), np.array(counts, dtype=float)
    draws = np.array(list(itertools.product(range(len(sums)), repeat=len(sums))))
    exact = np.repeat(sums[draws].sum(1) / counts[draws].sum(1), 100)  # each of the s ** s resamples is equally likely
    low, high = interval(sums, counts)
    # half a percent of drawing error each way
    assert np.quantile(exact, 0.02) - 1e-9 <= low <= np.quantile(exact, 0.03) + 1e-9
    assert np.quantile(exact, 0.97) - 1e-9 <= high <= np.quantile(exact, 0.98) + 1e-9


def test_the_interval_of_many_subjects_is_the_normal_one() -> None:
    means = np.random.default_rng(3).normal(0.7, 0.1, 300)
    low, high = interval(means * 4, np.full(300, 4.0))
    half = 1.96 * means.std() / 300**0.5
    assert (low, high) == (
        pytest.approx(means.mean() - half, abs=half / 20),
        pytest.approx(means.mean() + half, abs=half / 20),
    )


def test_more_pictures_of_the_same_subjects_do_not_narrow_the_interval() -> None:
    one = [row(f"s{n}", n / 10) for n in range(6)]
    many = [row(f"s{n}", n / 10, image) for n in range(6) for image in range(50)]
    ours, theirs = summarize(one, "DINO-I"), summarize(many, "DINO-I")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_the_interval_is_the_same_each_time_and_another_for_another_seed() -> None:
    sums, counts = np.random.default_rng(0).normal(size=10), np.ones(10)
    assert interval(sums, counts) == interval(sums, counts)
    assert interval(sums, counts, seed=1) != interval(sums, counts)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.integers(1, 5))
def test_the_interval_holds_the_mean_and_lies_between_the_subjects(means: list[float], pictures: int) -> None:
    rows = [row(f"s{n}", mean, image) for n, mean in enumerate(means) for image in range(pictures)]
    summary = summarize(rows, "DINO-I")
    assert min(means) - 1e-9 <= summary.low <= summary.mean + 1e-9
    assert summary.mean - 1e-9 <= summary.high <= max(means) + 1e-9


def test_categories_and_gates_are_summarised_apart() -> None:
    rows = [row("a", 1.0, gate=1.0), row("a", 3.0, gate=0.0), row("b", 5.0, category="object", gate=0.0)]
    assert {name: s.mean for name, s in by_category(rows, "DINO-I").items()} == {"live": 2.0, "object": 5.0}
    assert [(gate, s.mean) for gate, s in by_gate(rows, "DINO-I").items()] == [(0.0, 4.0), (1.0, 1.0)]
    assert list(by_gate([row("a", 1.0), row("b", 1.0, gate=0.5)], "DINO-I")) == [None, 0.5]


def test_real_against_real_counts_each_pair_once_and_never_a_picture_with_itself() -> None:
    angles = {"a": [0.0, 60.0, 90.0], "b": [10.0, 10.0], "alone": [5.0]}
    features = {
        name: torch.tensor([[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees]) * 7  # length is no matter
        for name, degrees in angles.items()
    }
    a = (np.cos(np.radians(60)) + np.cos(np.radians(90)) + np.cos(np.radians(30))) / 3
    summary = real_against_real(features)
    assert summary.mean == pytest.approx((a + 1) / 2)  # subjects weigh alike: three pairs of a, one of b
    assert (summary.images, summary.subjects) == (5, 2)
    with pytest.raises(ValueError, match="at least two"):
        real_against_real({"alone": features["alone"]})


# comparing -------------------------------------------------------------------------------------------------------------


def test_ranks_are_among_these_runs_and_among_table_1() -> None:
    runs = [run("low", 0.1), run("high", 0.9)]
    comparison = compare(runs)
    assert {line.label: line.rank for line in comparison.lines} == {"low": 2, "high": 1}
    means = {line.label: {c: s.mean for c, s in line.scores.items()} for line in comparison.lines}
    everyone = mean_ranks({**table1(), **means})
    assert {line.label: line.placed for line in comparison.lines} == {m: everyone[m] for m in means}
    assert comparison.table_1 == {method: everyone[method] for method in table1()}


def test_a_run_may_have_the_name_of_a_published_row() -> None:
    comparison = compare([run("FlexIP", 0.9), run("IP-Adapter", 0.1)])
    assert set(comparison.table_1) == set(table1())
    assert "**FlexIP (this run)**" in to_markdown(comparison)


def test_a_sweep_takes_part_with_one_gate_which_its_name_says() -> None:
    runs = [
        run("FlexIP", gates=(0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 1.0)),
        run("IP-Adapter", gates=(0.0, 0.6, 1.0), header={"knob": "scale"}),
    ]
    assert [line.label for line in compare(runs).lines] == ["FlexIP (gate 0.50)", "IP-Adapter (scale 0.60)"]
    chosen = compare(runs, gates={"FlexIP": 1.0}).lines[0]
    assert chosen.label == "FlexIP (gate 1.00)" and chosen.gate == 1.0
    assert chosen.scores["DINO-I"].mean == pytest.approx(0.5 + 0.015 + 0.1)
    assert list(chosen.by_gate) == [0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 1.0]
    refined = run("FlexIP", gates=(0.0, 0.525, 1.0))
    assert compare([refined]).lines[0].label == "FlexIP (gate 0.525)"
    with pytest.raises(ValueError, match=r"not scored at gate 0\.7; choose one of: 0, 0\.1, 0\.2, .*, 1"):
        compare(runs, gates={"FlexIP": 0.7})
    with pytest.raises(ValueError, match="given for Flexip, but the runs are"):
        compare(runs, gates={"Flexip": 0.5})


def test_runs_scored_with_different_models_are_refused_with_the_column() -> None:
    other = run("b", models={**MODELS, "CLIP-I": "another model"})
    with pytest.raises(ValueError, match="CLIP-I was scored with model of CLIP-I in a, but with another model in b"):
        compare([run("a"), other])


def test_runs_of_different_pictures_are_refused_with_the_pictures() -> None:
    with pytest.raises(
        ValueError, match=r"a and b are of different pictures \(2 only in b, such as s4 / 00 / 0, s4 / 01 / 0\)"
    ):
        compare([run("a", subjects=4), run("b", subjects=5)])


def test_a_sweep_that_lacks_pictures_at_one_gate_is_refused() -> None:
    whole = run("a", gates=(0.0, 0.5, 1.0))
    short = Scores(whole.method, whole.header, whole.columns, whole.missing, whole.rows[:-1])
    with pytest.raises(ValueError, match=r"a \(gate 0\.50\) and a \(gate 1\.00\) are of different pictures"):
        compare([short])


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda a: [], "no scores to compare"),
        (lambda a: [a, a], "Two runs are called a"),
        (lambda a: [Scores("a", {}, a.columns, {}, ())], "a has no pictures"),
        (lambda a: [Scores("a", {}, a.columns, {}, a.rows + a.rows[:1])], "two scores of s0 / 00 / 0"),
        (lambda a: [Scores("a", {}, a.columns, {}, a.rows + run("a", gates=(0.5,)).rows)], "with and without a gate"),
    ],
)
def test_unusable_runs_are_refused(broken: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(broken(run("a")))


def test_ranks_are_over_the_common_columns_and_say_so() -> None:
    lacking = run("b", 0.1, columns=("CLIP-T", "DINO-I"), missing={"Aesthetic": "The file heads.pth is missing."})
    comparison = compare([run("a"), lacking])
    assert comparison.ranked == ("CLIP-T", "DINO-I")
    text = to_markdown(comparison)
    assert "over the 2 columns that all runs have, CLIP-T, DINO-I, among the 2 runs here: a, b" in text
    assert "- Aesthetic (b): The file heads.pth is missing." in text
    assert comparison.table_1["lambda-Eclipse"] == mean_ranks(
        {**table1(), "a": run_means(comparison, 0), "b": run_means(comparison, 1)}, comparison.ranked
    )["lambda-Eclipse"]  # fmt: skip


def run_means(comparison, number: int) -> dict[str, float]:
    return {column: summary.mean for column, summary in comparison.lines[number].scores.items()}


def test_without_a_common_column_there_is_no_rank_and_no_place() -> None:
    comparison = compare([run("a", columns=("CLIP-T",)), run("b", columns=("DINO-I",))])
    assert [line.rank for line in comparison.lines] == [None, None] and not comparison.table_1
    text = to_markdown(comparison)
    assert "No mRank: the runs share none of" in text and "Table 1" not in text


def test_runs_of_the_mini_world_are_not_placed_in_table_1() -> None:
    comparison = compare([run("a", header={"benchmark": "mini world, omit, 48 held-out subjects"})])
    assert not comparison.table_1 and comparison.lines[0].placed is None
    assert "not placed in the paper's Table 1" in to_markdown(comparison)


# printing --------------------------------------------------------------------------------------------------------------


def tables_in(markdown: str) -> list[list[list[str]]]:
    blocks = re.findall(r"(?:^\|.*\|\n?)+", markdown, re.MULTILINE)
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in b.splitlines()] for b in blocks]


def full() -> Scores:
    return run(
        "Flex|IP\n2", gates=(0.0, 0.5, 1.0), header={**HEADER, "calibration": {"DINO-I": 0.7712}, "note": "a | b"}
    )


def test_every_markdown_table_is_rectangular_whatever_names_hold() -> None:
    found = tables_in(to_markdown(compare([full(), run("b")])))
    assert len(found) == 6  # runs, differences, Table 1, categories, gates, calibration
    for table in found:
        assert {len(line) for line in table} == {len(table[0])} and set(table[1]) == {"---"}


def test_markdown_names_models_counts_intervals_and_how_to_repeat_the_run() -> None:
    text = to_markdown(compare([full()]))
    assert text.splitlines()[2].startswith("Columns: CLIP-T: model of CLIP-T · CLIP-I: model of CLIP-I")
    runs, table, *_ = tables_in(text)
    assert runs[0] == ["method", "mRank", *COLUMNS, "images", "subjects"]
    assert re.fullmatch(r"0\.565 ± 0\.012 \[0\.55\d, 0\.57\d\]", runs[2][2]) and runs[2][-2:] == ["8", "4"]
    assert table[0][:3] == ["method", "mRank among these 10", "mRank as published"]
    assert [line[2] for line in table[2:] if line[0] == "ELITE"] == ["6.2"]
    ranks = [float(line[1]) for line in table[2:]]
    assert len(ranks) == 10 and ranks == sorted(ranks)
    for fact in ("commit: abc123", "steps: 20", "seeds: [0, 1]", "gate in the tables: 0.5", r"note: a \| b"):
        assert f"- {fact}" in text
    assert "| DINO-I (model of DINO-I) | 0.771 | 0.774 | -0.003 |" in text
    assert "calibration:" not in text


def test_columns_come_in_the_order_of_the_paper_then_the_second_set() -> None:
    names = ("extra", "DINO-I (DINOv2)", "DINO-I", "CLIP-T")
    comparison = compare([run("a", columns=names, models={name: name for name in names})])
    assert list(comparison.columns) == ["CLIP-T", "DINO-I", "DINO-I (DINOv2)", "extra"]


def test_one_category_and_one_gate_need_no_tables_of_parts() -> None:
    text = to_markdown(compare([Scores("a", {}, {"DINO-I": "m"}, {}, (row("s", 0.5), row("t", 0.7)))]))
    assert "## By" not in text and "The file of scores does not say." in text


def test_csv_and_json_hold_the_numbers_of_the_markdown() -> None:
    comparison = compare([full(), run("b", 0.3)])
    lines = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    data = json.loads(to_json(comparison))
    runs = tables_in(to_markdown(comparison))[0]
    for number, line in enumerate(comparison.lines):
        for column in COLUMNS:
            (found,) = [r for r in lines if (r["method"], r["part"], r["column"]) == (line.method, "all", column)]
            assert float(found["mean"]) == data["lines"][number]["scores"][column]["mean"] == line.scores[column].mean
            assert found["model"] == MODELS[column] == data["columns"][column]
            cell = runs[2 + number][2 + COLUMNS.index(column)]
            numbers = [f"{float(found[name]):.3f}" for name in ("mean", "std", "low", "high")]
            assert re.findall(r"\d\.\d{3}", cell) == numbers
    sweep = [r for r in lines if r["method"] == full().method and r["part"] == "gate" and r["column"] == "DINO-I"]
    assert [r["gate"] for r in sweep] == ["0.0", "0.5", "1.0"]
    assert [part["gate"] for part in data["lines"][0]["by_gate"]] == [0.0, 0.5, 1.0]
    assert {r["name"] for r in lines if r["part"] == "category"} == {"live", "object"}
    ranks = {r["method"]: float(r["mean"]) for r in lines if (r["part"], r["column"]) == ("with Table 1", "mRank")}
    assert ranks == {**comparison.table_1, **{line.method: line.placed for line in comparison.lines}}
    assert {entry["method"]: entry["mRank"] for entry in data["table_1"]} == comparison.table_1
    assert data["calibration"] == {"DINO-I": 0.7712}


def test_the_three_files_are_written_side_by_side(tmp_path: Path) -> None:
    comparison = compare([run("a")])
    paths = write_tables(tmp_path / "new", comparison)
    assert [path.name for path in paths] == ["scores_table.md", "scores_table.csv", "scores_table.json"]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    assert texts == [to_markdown(comparison), to_csv(comparison), to_json(comparison)]
