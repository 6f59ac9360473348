"""Line plots: values stand where they belong, nothing is clipped, nothing overlaps."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flexip_core.pictures.plots import COLOURS, Canvas, Series, line_plot, ticks

NAN = float("nan")
BLUE, RED = COLOURS[0], COLOURS[1]


def places(picture, colour):
    """(rows, columns) of the pixels of this colour, as sets."""
    distance = (picture[0] * 255 - torch.tensor(colour, dtype=torch.float32)).abs().amax(-1)
    rows, columns = torch.nonzero(distance < 12, as_tuple=True)
    return set(rows.tolist()), set(columns.tolist())


def middle(values):
    return (min(values) + max(values)) / 2


def plot(ys, xs=(0, 1, 2, 3, 4), **options):
    return line_plot([Series("a", xs, ys)], "x", "y", **options)


def test_a_picture_has_the_asked_size_and_comfyuis_form():
    picture = plot([0, 1, 2, 3, 4], size=(300, 200))
    assert picture.shape == (1, 200, 300, 3) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() == 1


def test_a_value_stands_proportionally_between_the_ends_of_its_axis():
    rows = {y: middle(places(plot([y] * 5, y_range=(0, 1)), BLUE)[0]) for y in (0, 0.25, 0.75, 1)}
    assert rows[0] > rows[1] + 150
    for y in (0.25, 0.75):
        assert rows[y] == pytest.approx(rows[0] + y * (rows[1] - rows[0]), abs=1)


def test_a_point_stands_proportionally_along_the_x_axis():
    columns = {
        x: middle(places(plot([0.5], xs=[x], x_range=(0, 10), y_range=(0, 1)), BLUE)[1]) for x in (0, 2.5, 5, 10)
    }
    for x in (2.5, 5):
        assert columns[x] == pytest.approx(columns[0] + x / 10 * (columns[10] - columns[0]), abs=1)


@pytest.mark.parametrize("hole", [NAN, math.inf, None])
def test_a_value_that_is_no_number_leaves_a_gap(hole):
    whole = places(plot([1, 1, 1, 1, 1]), BLUE)[1]
    ys = [1, 1, NAN if hole is None else hole, 1, 1]
    xs = (0, 1, NAN, 3, 4) if hole is None else (0, 1, 2, 3, 4)
    broken = places(plot(ys, xs), BLUE)[1]
    assert min(broken) == min(whole) and max(broken) == max(whole)
    assert len(broken) == pytest.approx(len(whole) / 2, rel=0.1)


def test_a_single_point_is_a_visible_dot():
    rows, columns = places(plot([7.5], xs=[3]), BLUE)
    assert len(rows) >= 4 and len(columns) >= 4


def test_a_lone_point_between_gaps_is_a_visible_dot():
    assert places(plot([NAN, NAN, 2, NAN, NAN]), BLUE)[0]


def test_points_draw_dots_on_the_line():
    xs, ys = (0, 1, 2, 3, 4), (1, 1, 1, 1, 1)
    dots = line_plot([Series("a", xs, ys, points=True)], "x", "y")
    assert len(places(dots, BLUE)[0]) > len(places(plot(ys), BLUE)[0])


def test_a_spread_is_a_pale_band_around_its_line_only():
    band = [(0.25, 0.75)] * 5
    picture = line_plot([Series("a", range(5), [0.5] * 5, band)], "x", "y", y_range=(0, 1))
    pale = tuple(255 + (c - 255) * 60 / 255 for c in BLUE)
    rows, _ = places(picture, pale)
    expected = [middle(places(plot([y] * 5, y_range=(0, 1)), BLUE)[0]) for y in (0.75, 0.25)]
    assert (min(rows), max(rows)) == pytest.approx(expected, abs=2)


def test_an_axis_without_a_given_range_holds_the_whole_spread():
    series = [Series("a", range(5), [0.5] * 5, [(0.5, 0.5)] * 4 + [(0.2, 0.9)])]
    by_data = line_plot(series, "x", "y")
    assert torch.equal(by_data, line_plot(series, "x", "y", y_range=(0.2, 0.9)))


def test_several_series_have_a_legend_and_one_has_none():
    nothing = [Series("first", [0, 1], [NAN, NAN]), Series("second", [0, 1], [NAN, NAN])]
    both, one = line_plot(nothing, "x", "y"), line_plot(nothing[:1], "x", "y")
    assert places(both, BLUE)[0] and places(both, RED)[0]
    assert not places(one, BLUE)[0]


def test_a_line_outside_the_given_range_goes_no_further_than_a_dot_on_the_edge():
    rows, _ = places(plot([-3, 0.5, 9, 0.5, -1e9], y_range=(0, 1)), BLUE)
    dots = line_plot([Series("a", range(5), [0, 1, 0, 1, 0], points=True)], "x", "y", y_range=(0, 1))
    inside, _ = places(dots, BLUE)
    assert min(rows) >= min(inside) - 1 and max(rows) <= max(inside) + 1


def test_a_mark_is_a_line_at_its_x_and_outside_the_range_it_is_left_out():
    bare = plot([1, 1, 1, 1, 1])
    marked = plot([1, 1, 1, 1, 1], marks=[(2, "")])
    columns = set(torch.nonzero((bare - marked).abs().amax(-1)[0, 60:250])[:, 1].tolist())
    assert columns and len(columns) <= 3
    assert middle(columns) == pytest.approx(middle(places(bare, BLUE)[1]), abs=1.5)
    assert torch.equal(bare, plot([1, 1, 1, 1, 1], x_range=(0, 4), marks=[(7, "away")]))


def test_many_words_make_the_letters_smaller_not_the_lines_invisible():
    series = [Series(f"a rather long name {i}", range(5), [0, 1, 0, 1, i / 6]) for i in range(6)]
    marks = [(x, f"a mark at {x}") for x in (1.9, 2.0, 2.1)]
    rows, _ = places(line_plot(series, "x", "y", "title", marks=marks)[:, 130:], BLUE)
    assert max(rows) - min(rows) > 0.35 * 320


def test_no_values_at_all_are_said():
    words = line_plot([], "x", "y") != line_plot([Series("a", [0], [1e9])], "x", "y", x_range=(0, 1), y_range=(0, 1))
    assert words[0, 100:220, 180:320].any()


def test_series_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="'loss'.*different lengths"):
        Series("loss", [1, 2], [1])
    with pytest.raises(ValueError, match="'loss'.*different lengths"):
        Series("loss", [1, 2], [1, 2], [(0, 1)])


numbers = st.floats(-1e12, 1e12) | st.just(NAN) | st.just(math.inf)
words = st.text("abc XYZ äß漢", max_size=40)


@st.composite
def lines(draw):
    count = draw(st.integers(0, 5))
    xs, ys, lower, upper = (draw(st.lists(numbers, min_size=count, max_size=count)) for _ in range(4))
    spread = list(zip(lower, upper)) if draw(st.booleans()) else None
    return Series(draw(words), xs, ys, spread, draw(st.booleans()))


@given(
    st.lists(lines(), max_size=3), words, words, words, st.lists(st.tuples(numbers, words), max_size=3), st.booleans()
)
def test_whatever_is_drawn_stays_inside_the_picture(series, x_label, y_label, title, marks, small):
    marks = [(x, label) for x, label in marks if math.isfinite(x)]
    picture = line_plot(series, x_label, y_label, title, size=(240, 180) if small else (480, 320), marks=marks)
    assert torch.isfinite(picture).all()
    edge = torch.ones(picture.shape[1:3], dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    assert (picture[0][edge] == 1).all()


@given(st.lists(st.tuples(st.floats(0, 1440), st.text("abcdefgh", max_size=20)), max_size=8), words)
def test_labels_of_marks_never_overlap_each_other_or_the_y_label(marks, y_label):
    canvas = Canvas((480, 320), 14)
    marks = sorted(marks)
    taken = [(0, canvas.gap, canvas.gap + canvas.width(y_label))]
    for (_, label), (row, start) in zip(marks, canvas.mark_rows(marks, y_label)):
        taken.append((row, start, start + canvas.width(label)))
        assert start >= canvas.gap - 1e-6 and taken[-1][2] <= canvas.size[0] - canvas.gap + 1e-6
    for (row, start, end), (other_row, other_start, other_end) in itertools.combinations(taken, 2):
        assert row != other_row or end <= other_start or other_end <= start


@given(st.floats(-1e7, 1e7), st.floats(1e-7, 1e7), st.integers(2, 12), st.booleans())
def test_ticks_are_few_equidistant_different_and_inside(low, span, most, whole):
    assume(span > 1e-9 * abs(low))  # as line_plot makes sure
    found = ticks(low, low + span, most, whole)
    values, texts = [value for value, _ in found], [text for _, text in found]
    assert len(found) <= most + 1 and len(set(texts)) == len(texts)
    rounding = 1e-6 * span + 1e-14 * abs(low)
    assert all(low - rounding <= value <= low + span + rounding for value in values)
    for before, between, after in zip(values, values[1:], values[2:]):
        assert after - between == pytest.approx(between - before, abs=rounding)
    if whole:
        assert all(float(value).is_integer() for value in values)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(60, 1000))
def test_numbers_on_the_axes_have_air_between_them(low, span, room):
    canvas = Canvas((480, 320), 14)
    found = canvas.y_ticks((low, low + span), room)
    assert len(found) <= 3 or (len(found) - 1) * canvas.line * 1.6 <= room * 1.0001
    found = canvas.x_ticks((low, low + span), room, False)
    texts = [text for _, text in found]
    assert len(found) <= 3 or sum(map(canvas.width, texts)) + len(texts) * canvas.letter < room


@pytest.mark.parametrize(
    "extent, most, texts",
    [
        ((0, 1), 5, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ((0, 20), 4, ["0", "5", "10", "15", "20"]),
        ((-0.3, 0.3), 6, ["-0.3", "-0.2", "-0.1", "0.0", "0.1", "0.2", "0.3"]),
        ((1e-7, 3e-7), 4, ["1e-07", "1.5e-07", "2e-07", "2.5e-07", "3e-07"]),
    ],
)
def test_ticks_are_the_numbers_a_person_would_write(extent, most, texts):
    assert [text for _, text in ticks(*extent, most)] == texts
