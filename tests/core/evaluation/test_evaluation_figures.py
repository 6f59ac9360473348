"""Figures: the texts that they must show, where their points stand, and that the same scores give the same bytes."""

from __future__ import annotations

import dataclasses
import sys
import xml.etree.ElementTree as xml

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from flexip_core.evaluation import figures
from flexip_core.evaluation.curves import Curves
from flexip_core.evaluation.figures import SheetRow
from flexip_core.measuring.scores_file import Row, Scores
from flexip_core.pictures.plots import COLOURS

MODELS = {
    "CLIP-T": f"OpenAI CLIP ViT-B/32 (clip.safetensors, sha256 {'ab' * 32}) at 224 px",
    "CLIP-I": "OpenAI CLIP ViT-B/32",
    "DINO-I": "DINO ViT-S/16",
}
GATES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)


def swept(method: str = "FlexIP", knob: str = "gate", subjects: int = 3, lift: float = 0.0, gates=GATES) -> Scores:
    """Two prompts per subject; CLIP-T falls from .3, DINO-I rises from .5, subjects .02 apart."""
    rows = tuple(
        Row(
            f"s{subject}",
            "object",
            f"prompt {prompt}",
            0,
            gate,
            {
                "CLIP-T": 0.3 - 0.1 * gate**2 + 0.02 * subject,
                "CLIP-I": 0.7 + 0.2 * gate + 0.02 * subject,
                "DINO-I": 0.5 + 0.3 * gate + lift + 0.02 * subject + 0.01 * prompt,
            },
        )
        for gate in gates
        for subject in range(subjects)
        for prompt in range(2)
    )
    return Scores(method, {"knob": knob}, MODELS, {}, rows)


def fixed(method: str = "DisEnVisioner") -> Scores:
    one = swept(method, gates=(0.5,))
    return dataclasses.replace(one, rows=tuple(dataclasses.replace(row, gate=None) for row in one.rows))


def texts(path) -> list[str]:
    return ["".join(element.itertext()) for element in xml.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB")).astype(int)


def count(picture: np.ndarray, colour) -> int:
    return int((np.abs(picture - colour).max(-1) < 12).sum())


def test_curves_name_their_scores_models_methods_and_knobs(tmp_path):
    figures.gate_curves([swept(), swept("IP-Adapter", "scale", lift=-0.1)], tmp_path / "curves.svg")
    shown = texts(tmp_path / "curves.svg")
    for text in ("CLIP-T", "CLIP-I", "DINO-I", "FlexIP", "IP-Adapter", "DINO ViT-S/16"):
        assert text in shown, text
    assert shown.count("gate or scale") == 3
    assert any("95 % bootstrap interval over subjects" in text for text in shown)
    assert any("clip.safetensors" in text for text in shown) and not any("abab" in text for text in shown)


def test_curves_have_their_methods_colours_and_thin_lines_only_if_wanted(tmp_path):
    thin = {}
    for each in (False, True):
        path = tmp_path / f"{each}.svg"
        figures.gate_curves([swept(subjects=5)], path, ("DINO-I",), each_subject=each)
        thin[each] = path.read_text().count("stroke-opacity: 0.35")
        assert ("thin: single subjects" in " ".join(texts(path))) == each
    assert thin == {False: 0, True: 5}
    figures.gate_curves([swept(), swept("other", lift=0.2)], tmp_path / "two.png", ("DINO-I",))
    picture = pixels(tmp_path / "two.png")
    assert picture.shape[1] == 5.4 * figures.DPI
    assert count(picture, COLOURS[0]) > 300 and count(picture, COLOURS[1]) > 300
    assert count(picture, COLOURS[2]) == 0


def test_the_band_is_the_bootstrap_interval_over_subjects(monkeypatch, tmp_path):
    asked = []

    def interval(sums, counts):
        asked.append((sums.tolist(), counts.tolist()))
        return 0.1, 0.9

    monkeypatch.setattr(figures, "interval", interval)
    figures.gate_curves([swept(subjects=2)], tmp_path / "one.svg", ("DINO-I",))
    assert len(asked) == len(GATES)
    sums, counts = asked[0]
    assert sums == pytest.approx([0.5 + 0.51, 0.52 + 0.53]) and counts == [2, 2]
    asked.clear()
    figures.gate_curves([swept(subjects=1)], tmp_path / "none.svg", ("DINO-I",))
    assert not asked and "bootstrap" not in " ".join(texts(tmp_path / "none.svg"))


def test_the_front_names_gates_methods_and_published_points(tmp_path):
    published = [("ELITE", 0.269, 0.657), ("MoMA", 0.265, 0.656), ("lambda-Eclipse", 0.296, 0.467)]
    figures.front([swept()], tmp_path / "front.svg", [fixed()], published)
    shown = texts(tmp_path / "front.svg")
    for text in (
        "0",
        "1",
        "0.5",
        "FlexIP",
        "DisEnVisioner",
        "ELITE",
        "MoMA",
        "lambda-Eclipse",
        "CLIP-T: text followed",
    ):
        assert text in shown, text
    assert "DINO-I: subject kept" in shown and "DINO-I: DINO ViT-S/16" in shown
    assert "published; other encoders may be behind them" in shown
    assert "numbers: gate; up and to the right is better" in shown


def test_points_of_the_front_stand_where_the_means_are(tmp_path, monkeypatch):
    seen = {}
    place = figures._place

    def spy(figure, ax, labels, lines):
        place(figure, ax, labels, lines)
        seen.update(labels=labels, lines=lines, notes=[t for t in ax.texts], inside=ax.get_window_extent())

    monkeypatch.setattr(figures, "_place", spy)
    scores = swept()
    figures.front([scores], tmp_path / "front.png", [fixed()])
    curves = Curves(scores)
    expected = torch.stack([curves.of("CLIP-T").mean(1), curves.of("DINO-I").mean(1)], 1)
    assert np.allclose(seen["lines"][0], expected.numpy())
    assert np.allclose(seen["lines"][1], [[0.3 - 0.025 + 0.02, 0.5 + 0.15 + 0.02 + 0.005]])
    assert count(pixels(tmp_path / "front.png"), COLOURS[0]) > 300


def test_labels_of_a_crowded_front_cover_neither_each_other_nor_the_frame(tmp_path, monkeypatch):
    boxes = {}
    place = figures._place

    def spy(figure, ax, labels, lines):
        place(figure, ax, labels, lines)
        boxes.update(labels=[note.get_window_extent() for note in ax.texts], inside=ax.get_window_extent())

    monkeypatch.setattr(figures, "_place", spy)
    published = [(f"method {i}", 0.26 + 0.004 * i, 0.7 + 0.002 * i) for i in range(6)]
    figures.front([swept(), swept("IP-Adapter", "scale", lift=-0.02)], tmp_path / "f.png", (), published)
    found = boxes["labels"]
    assert len(found) >= 6 + 4  # the published and the ends at least
    assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])
    inside = boxes["inside"]
    assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 and inside.y0 <= b.y0 and b.y1 <= inside.y1 for b in found)


def test_a_refined_sweep_numbers_the_tenths_only(tmp_path):
    gates = tuple(i / 10 for i in range(11)) + tuple(0.4 + 0.005 * i for i in range(1, 20))
    figures.front([swept(gates=gates)], tmp_path / "front.svg")
    shown = texts(tmp_path / "front.svg")
    assert "0.4" in shown and "0.405" not in shown


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_same_scores_give_the_same_bytes_whatever_matplotlib_is_told_elsewhere(tmp_path, kind):
    import matplotlib

    def draw(name):
        figures.gate_curves([swept()], tmp_path / f"{name}.{kind}")
        figures.front([swept()], tmp_path / f"{name}_front.{kind}", [fixed()])
        return (tmp_path / f"{name}.{kind}").read_bytes(), (tmp_path / f"{name}_front.{kind}").read_bytes()

    first = draw("first")
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "other", "axes.grid": False}):
        assert draw("second") == first
        assert matplotlib.rcParams["font.size"] == 20
    assert b"<dc:date>" not in first[0] and b"Software" not in first[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": {**MODELS, "DINO-I": "DINOv2"}}, "different models behind DINO-I"),
        ({"rows": swept().rows[1:]}, "lacks s0"),
    ],
)
def test_methods_that_share_no_axis_are_refused(tmp_path, change, said):
    other = dataclasses.replace(swept("other"), **change)
    for draw in (figures.gate_curves, figures.front):
        with pytest.raises(ValueError, match=said):
            draw([swept(), other], tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())


def test_a_score_that_was_not_measured_says_why(tmp_path):
    for scores in (swept(), fixed()):
        rows = tuple(dataclasses.replace(row, scores={"CLIP-T": 0.3}) for row in scores.rows)
        lacking = dataclasses.replace(scores, rows=rows, missing={"DINO-I": "The file dino.safetensors is missing."})
        with pytest.raises(ValueError, match=r"cannot be drawn: The file dino\.safetensors"):
            figures.front(*(([lacking], tmp_path / "x.svg") if scores.gates else ([], tmp_path / "x.svg", [lacking])))


def test_other_kinds_of_files_and_a_missing_matplotlib_are_told_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"x\.pdf: a figure is saved as \.svg or \.png"):
        figures.front([swept()], tmp_path / "x.pdf")
    for draw in (figures.gate_curves, figures.front):
        with pytest.raises(ValueError, match="There is no"):
            draw([], tmp_path / "x.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        figures.front([swept()], tmp_path / "x.svg")


@pytest.fixture
def pictures(tmp_path):
    """Two cases, reference and two gates, one colour each; the references are not square."""

    def make(name, colour, size=(40, 40)):
        Image.new("RGB", size, colour).save(tmp_path / name)
        return tmp_path / name

    return [
        SheetRow("dog 00", make("a.png", "red", (80, 40)), [make("b.png", "lime"), make("c.png", "blue")]),
        SheetRow("cat 01", make("d.png", "cyan"), [make("e.png", "yellow"), make("f.png", "magenta")]),
    ]


def test_a_gate_sheet_has_a_row_per_case_and_a_column_per_gate_after_the_reference(tmp_path, pictures):
    figures.gate_sheet(pictures, (0.0, 1.0), tmp_path / "sheet.png", side=200)
    sheet = pixels(tmp_path / "sheet.png")
    colours = [["red", "lime", "blue"], ["cyan", "yellow", "magenta"]]
    centres = np.array(
        [[np.argwhere(np.abs(sheet - ImageColor.getrgb(name)).max(-1) == 0).mean(0) for name in row] for row in colours]
    )
    assert (np.diff(centres[..., 0], axis=0) > 190).all() and (np.diff(centres[..., 1], axis=1) > 190).all()
    assert np.allclose(centres[:, :, 1], centres[:1, :, 1])
    assert count(sheet, ImageColor.getrgb("red")) == 200 * 200
    first = (tmp_path / "sheet.png").read_bytes()
    figures.gate_sheet(pictures, (0.0, 1.0), tmp_path / "sheet.png", side=200)
    assert (tmp_path / "sheet.png").read_bytes() == first
    figures.gate_sheet(pictures, (0.0, 1.0), tmp_path / "sheet.jpg")
    assert pixels(tmp_path / "sheet.jpg").shape[0] < sheet.shape[0]


def test_small_pictures_keep_their_pixels(tmp_path):
    tiny = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(tiny.numpy()).save(tmp_path / "tiny.png")
    assert torch.equal((figures._part(tmp_path / "tiny.png", 192) * 255).round().byte()[6::12, 6::12], tiny)


def test_a_sheet_that_cannot_be_made_says_so(tmp_path, pictures):
    with pytest.raises(ValueError, match="dog 00 has 2 pictures for 3 columns"):
        figures.gate_sheet(pictures, (0.0, 0.5, 1.0), tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="at least one case"):
        figures.gate_sheet([], (0.0,), tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"sheet\.svg: a sheet of pictures is saved as \.png or \.jpg"):
        figures.gate_sheet(pictures, (0.0, 1.0), tmp_path / "sheet.svg")
    with pytest.raises(ValueError, match="gone.png"):
        figures.gate_sheet(
            [dataclasses.replace(pictures[0], reference=tmp_path / "gone.png")], (0.0, 1.0), tmp_path / "s.png"
        )
