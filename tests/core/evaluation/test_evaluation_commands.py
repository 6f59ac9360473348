"""python -m flexip_core.evaluation, from a folder of pictures to tables and figures, as somebody types it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from flexip_core.evaluation.__main__ import main, sheet_of_methods
from flexip_core.evaluation.benchmark import picture_name, read_benchmark
from flexip_core.measuring import scores_file
from flexip_core.untrained import mini

GATES = (0.0, 0.5, 1.0)


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 64), Image.Resampling.NEAREST).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """models/ with the mini encoders, bench/ with two subjects and two prompts, made/ with a sweep of them."""
    root = tmp_path_factory.mktemp("evaluation")
    mini.make_mini_models(root / "models")
    for number, name in enumerate(("dog", "vase")):
        for view in range(2):
            draw(root / "bench" / name / f"{view:02d}.png", 10 * number + view)
        (root / "bench" / name / "class.txt").write_text(name)
    (root / "bench" / "prompts.txt").write_text("a {class} on sand\na {class} in the snow\n")
    for case in read_benchmark(root / "bench").cases:
        for gate in GATES:
            tree, name = root / "made" / f"gate_{gate:.2f}", picture_name(case, 0)
            draw(tree / "tgt_image" / f"{name}.png", len(case.subject.name) + 10 * case.number + int(100 * gate))
            (tree / "src_image").mkdir(exist_ok=True)
            (tree / "src_image" / f"{name}.png").write_bytes(case.subject.references[0].read_bytes())
            (tree / "text").mkdir(exist_ok=True)
            (tree / "text" / f"{name}.txt").write_text(case.prompt)
    (root / "made" / "run.json").write_text(json.dumps({"method": "FlexIP", "steps": 30, "cfg": 7.5, "knob": "gate"}))
    return root


def encoders(place):
    folder = place / "models" / "clip_vision"
    return [f"--use=clip={folder / mini.MINI_CLIP_FILE}", f"--use=dino={folder / mini.MINI_DINO_FILE}"]


def test_without_scorers_there_is_a_line_for_each_that_is_missing(place, tmp_path, caplog, capsys):
    assert main(["score", str(place / "made"), "--weights", str(tmp_path)]) == 1
    first, *lines = caplog.records[-1].getMessage().splitlines()
    assert first == "Nothing can be measured." and len(lines) == 8 and all(" lacks " in line for line in lines)
    assert "picture" not in capsys.readouterr().err  # no bar before it


def test_two_methods_side_by_side_on_several_prompts(place, scored, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(place / "made", other)
    (other / "run.json").write_text(json.dumps({"method": "Other", "knob": "gate"}))
    rows, names = sheet_of_methods([place / "made", other], {"Other": 1.0})
    assert names == ["FlexIP (0.5)", "Other (1)"] and len(rows) == 4
    assert {row.label for row in rows} == {case.prompt for case in read_benchmark(place / "bench").cases}
    assert (
        len({row.label for row in rows[:2]}) == 2 and rows[0].label.split(" ", 2)[2] != rows[1].label.split(" ", 2)[2]
    )
    assert [
        ["gate_0.50" in str(ours), "gate_1.00" in str(theirs)] for row in rows for ours, theirs in [row.pictures]
    ] == [[True, True]] * 4
    folders = ["--pictures", str(place / "made"), "--pictures", str(other)]
    assert main(["plot", str(scored), *folders, "--gate", "Other=1", "--to", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "method_sheet.png").is_file()


@pytest.fixture(scope="module")
def scored(place):
    options = ["score", str(place / "made"), "--benchmark", str(place / "bench"), *encoders(place)]
    assert main(options) == 0
    return place / "made" / "scores.json"


def test_score_measures_what_the_files_allow_and_says_what_is_lacking(scored, caplog):
    found = scores_file.read(scored)
    assert len(found.rows) == 12 and found.gates == GATES and found.method == "FlexIP"
    assert set(found.columns) == {"CLIP-T", "CLIP-I", "DINO-I"} and "sha256" in found.columns["DINO-I"]
    assert "RN50" in found.missing["CLIP-IQA"] and "--weights" in found.missing["Aesthetic"]
    assert found.header["steps"] == 30 and set(found.header["calibration"]) == {"CLIP-I", "DINO-I"}
    assert found.features.shape[0] == 12


def test_compare_writes_tables_and_gate_measures(place, scored):
    assert main(["compare", str(scored), "--to", str(place / "tables")]) == 0
    written = {path.name: path.read_text() for path in (place / "tables").iterdir()}
    table = written["scores_table.md"]
    assert "FlexIP (gate 0.50)" in table and "CLIP-IQA" in table
    assert (
        "lambda-Eclipse" not in table and "files that do not compare" in table
    )  # the paper's are not from mini encoders
    assert json.loads(written["scores_table.json"]) and written["scores_table.csv"].count("\n") >= 2
    assert "largest jump share" in written["gate_measures.md"] and json.loads(written["gate_measures.json"])


def test_compare_sets_two_sweeps_side_by_side(place, scored):
    found = scores_file.read(scored)
    other = place / "ip.json"
    scores_file.write(other, scores_file.dataclasses.replace(found, method="IP-Adapter"))
    assert main(["compare", str(scored), str(other), "--gate", "FlexIP=1", "--to", str(place / "two")]) == 0
    text = (place / "two" / "gate_measures.md").read_text()
    assert "FlexIP meets" in text and "IP-Adapter meets" in text
    assert "FlexIP (gate 1.00)" in (place / "two" / "scores_table.md").read_text()


def test_plot_draws_curves_front_and_the_sheet_of_gates(place, scored):
    assert main(["plot", str(scored), "--pictures", str(place / "made"), "--to", str(place / "figures")]) == 0
    names = {path.name for path in (place / "figures").iterdir()}
    assert names == {"gate_curves.svg", "gate_curves.png", "front.svg", "front.png", "gate_sheet.png"}
    assert "lambda-Eclipse" not in (place / "figures" / "front.svg").read_text()


def test_another_methods_folder_is_scored_without_a_benchmark(place):
    target = place / "other.json"
    options = ["score", str(place / "made" / "gate_0.50"), *encoders(place), "--method", "Other", "--to", str(target)]
    assert main([*options, "--columns", "DINO-I"]) == 0
    found = scores_file.read(target)
    assert found.method == "Other" and found.gates == () and set(found.columns) == {"DINO-I"} and len(found.rows) == 4


def test_a_missing_picture_stops_the_scoring_and_is_named(place, caplog, tmp_path):
    (gone,) = (place / "made" / "gate_1.00" / "tgt_image").glob("dog-01-0.png")
    data = gone.read_bytes()
    gone.unlink()
    try:
        assert main(["score", str(place / "made"), "--benchmark", str(place / "bench"), *encoders(place)]) == 1
    finally:
        gone.write_bytes(data)
    assert "gate_1.00/tgt_image/dog-01-0" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["score", "--mini-world", "omit"], "--to"),
        (["score"], "Name the folder"),
        (["generate", "BENCH", "x", "--server", "y", "--gates", "0,1", "--strengths", "1"], "exclude each other"),
        (["generate", "BENCH", "x", "--server", "y", "--gates", "0, 2"], "from 0 to 1"),
        (["generate", "BENCH", "x", "--server", "y", "--set", "steps"], "write --set steps=..."),
        (["compare", "BENCH/prompts.txt", "--to", "x"], "not a file of scores"),
        (["score", "--mini-world", "omit", "--run", "mine", "--to", "x"], "flexip and ip"),
    ],
)
def test_a_mistake_is_a_sentence(place, caplog, options, said):
    assert main([text.replace("BENCH", str(place / "bench")) for text in options]) == 1
    assert said in caplog.text


def test_the_small_world_is_scored_out_of_the_box(tmp_path):
    """With nothing but what comes with the pack; the front, the measures and the tables know that it is another world."""
    for run in ("flexip", "ip"):
        assert (
            main(["score", "--mini-world", "omit", "--run", run, "--cases", "2", "--to", str(tmp_path / f"{run}.json")])
            == 0
        )
    files = [str(tmp_path / "flexip.json"), str(tmp_path / "ip.json")]
    assert main(["compare", *files, "--to", str(tmp_path)]) == 0
    assert main(["plot", *files, "--to", str(tmp_path)]) == 0
    assert "lambda-Eclipse" not in (tmp_path / "front.svg").read_text()
    assert "scale 0 to 1" in (tmp_path / "gate_measures.md").read_text()


@pytest.mark.parametrize(
    "text, says", [(None, "There is no file"), ('{"gates": []}', "it has no 'format'"), ("[1]", "not a file of scores")]
)
def test_what_is_no_file_of_scores_is_told_in_a_sentence(caplog, tmp_path, text, says):
    path = tmp_path / "scores.json"
    if text is not None:
        path.write_text(text)
    assert main(["compare", str(path), "--to", str(tmp_path / "tables")]) == 1
    assert says in caplog.text and "scores.json" in caplog.text and "Errno" not in caplog.text
