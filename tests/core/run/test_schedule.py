"""Gates along the sampling and along the batch."""

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flexip_core.run.schedule import (
    GRID,
    PRESETS,
    GateBatch,
    GateCurve,
    PercentOfSigma,
    parse_numbers,
    preset_curve,
)

part = st.floats(0, 1)


@st.composite
def curves(draw):
    millionths = sorted(draw(st.sets(st.integers(0, 10**6), min_size=1, max_size=8)))
    return GateCurve(tuple((number / 10**6, draw(part)) for number in millionths), "drawn")


@given(curves())
def test_a_curve_goes_through_its_points_and_stays_constant_beyond_them(curve):
    for percent, gate in curve.points:
        assert curve(percent) == gate
    assert curve(-1) == curve.points[0][1] and curve(2) == curve.points[-1][1]


@given(curves(), part)
def test_between_two_points_a_curve_is_a_straight_line(curve, t):
    for (x0, y0), (x1, y1) in itertools.pairwise(curve.points):
        x = x0 + t * (x1 - x0)
        assert curve(x) == pytest.approx(y0 + (x - x0) / (x1 - x0) * (y1 - y0), abs=1e-6)


@given(curves(), st.floats(-1, 2))
def test_a_curve_never_leaves_the_range_of_its_points(curve, percent):
    gates = [gate for _, gate in curve.points]
    assert 0 <= curve(percent) <= 1
    assert min(gates) - 1e-12 <= curve(percent) <= max(gates) + 1e-12


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((0.5, 0.5), (0.5, 0.6)),
        ((0.6, 0.5), (0.5, 0.6)),
        ((-0.1, 0.5),),
        ((0, 0.5), (1.1, 0.5)),
        ((0, 1.1),),
        ((0, -0.1),),
        ((0, math.nan),),
        ((math.nan, 0),),
        ((0, 0.5), (math.nan, 0.5)),
    ],
)
def test_a_curve_that_makes_no_sense_is_refused_by_name(points):
    with pytest.raises(ValueError, match="gate curve 'mine'"):
        GateCurve(points, "mine")


def test_equal_curves_are_equal_keys():
    assert hash(preset_curve("linear", 0.9, 0.3)) == hash(preset_curve("linear", 0.9, 0.3))
    assert preset_curve("linear", 0.9, 0.3) != preset_curve("linear", 0.9, 0.2)


@given(st.sampled_from(PRESETS), part, part)
def test_every_preset_stays_between_its_two_values_and_never_turns_round(preset, start, end):
    gates = [preset_curve(preset, start, end)(percent) for percent in GRID]
    assert min(gates) >= min(start, end) - 1e-12 and max(gates) <= max(start, end) + 1e-12
    steps = [after - before for before, after in itertools.pairwise(gates)]
    assert all(step <= 1e-12 for step in steps) or all(step >= -1e-12 for step in steps)


@given(part, part)
def test_linear_and_eases_go_from_start_to_end(start, end):
    for preset in ("linear", "ease in", "ease out", "ease in-out"):
        curve = preset_curve(preset, start, end)
        assert (curve(0), curve(1)) == (start, end)


@given(part, part, part)
def test_constant_is_start_all_along(start, end, percent):
    assert preset_curve("constant", start, end)(percent) == start


@given(part, part, part)
def test_linear_is_the_straight_line(start, end, percent):
    assert preset_curve("linear", start, end)(percent) == pytest.approx(start + (end - start) * percent, abs=1e-9)


@given(part, part)
def test_identity_first_and_style_first_order_the_values_themselves(a, b):
    high, low = max(a, b), min(a, b)
    identity, style = preset_curve("identity first", a, b), preset_curve("style first", a, b)
    for percent in (0, 0.2, 0.4):
        assert (identity(percent), style(percent)) == (high, low)
    for percent in (0.6, 0.8, 1):
        assert (identity(percent), style(percent)) == (low, high)
    assert identity(0.5) == pytest.approx((a + b) / 2)
    assert identity(0.45) + style(0.45) == pytest.approx(a + b)


def test_the_change_over_is_smooth():
    curve = preset_curve("identity first", 1, 0)
    inside = [curve(percent / 1000) for percent in range(400, 601)]
    assert max(abs(a - b) for a, b in itertools.pairwise(inside)) < 0.01
    assert curve(0.41) > 0.99 and curve(0.59) < 0.01  # leaves and arrives flat


def test_ease_in_leaves_slowly_and_ease_out_arrives_slowly():
    curve = {preset: preset_curve(preset, 0, 1) for preset in PRESETS}
    for percent in (0.25, 0.5, 0.75):
        assert curve["ease in"](percent) < curve["linear"](percent) - 0.2
        assert curve["ease out"](percent) > curve["linear"](percent) + 0.2
    assert curve["ease in-out"](0.25) < 0.1 and curve["ease in-out"](0.75) > 0.9


@given(part, part)
def test_all_presets_differ_visibly(start, end):
    assume(abs(start - end) > 0.1)
    table = {preset: [preset_curve(preset, start, end)(p) for p in GRID] for preset in PRESETS}
    for a, b in itertools.combinations(PRESETS, 2):
        difference = max(abs(x - y) for x, y in zip(table[a], table[b]))
        assert difference > 0.15 * abs(start - end), (a, b)


def test_the_name_of_a_preset_says_what_it_does():
    assert preset_curve("identity first", 0.3, 0.9).name == "identity first, 0.9 to 0.3"
    assert preset_curve("constant", 0.3, 0.9).name == "constant 0.3"


gates = st.lists(part, min_size=1, max_size=6).map(tuple)


@given(gates, st.integers(1, 40))
def test_repeat_takes_the_values_in_turn(values, batch):
    got = GateBatch(values, "repeat").values_for(batch)
    assert got == (values * batch)[:batch]


@given(gates, st.integers(2, 40))
def test_interpolate_reaches_first_and_last_and_stays_within_the_values(values, batch):
    got = GateBatch(values, "interpolate").values_for(batch)
    assert len(got) == batch and got[0] == values[0] and got[-1] == values[-1]
    assert min(values) - 1e-12 <= min(got) and max(got) <= max(values) + 1e-12
    assert all(0 <= gate <= 1 for gate in got)


@given(gates, st.integers(1, 6))
def test_interpolate_hits_every_key_frame_when_they_fall_on_latents(values, between):
    batch = (len(values) - 1) * between + 1
    got = GateBatch(values, "interpolate").values_for(batch)
    assert got[::between] == pytest.approx(values, abs=1e-12)


def test_interpolate_is_linear_between_key_frames():
    assert GateBatch((1.0, 0.2), "interpolate").values_for(5) == pytest.approx((1, 0.8, 0.6, 0.4, 0.2))
    assert GateBatch((0.0, 1.0, 0.0), "interpolate").values_for(4) == pytest.approx((0, 2 / 3, 2 / 3, 0))


@given(gates, st.sampled_from(("repeat", "interpolate")))
def test_a_single_latent_gets_the_first_value(values, spread):
    assert GateBatch(values, spread).values_for(1) == values[:1]


@pytest.mark.parametrize("values", [(), (1.1,), (0.5, -0.1), (math.nan,)])
def test_a_batch_of_gates_outside_0_to_1_is_refused(values):
    with pytest.raises(ValueError, match="from 0 to 1"):
        GateBatch(values, "repeat")


def test_an_unknown_spread_is_refused():
    with pytest.raises(ValueError, match="interpolate, repeat.*'cubic'"):
        GateBatch((1.0,), "cubic")


def log_linear(percent, largest=14.6, smallest=0.03):
    """The rule of a model as ComfyUI writes it, with its special values at both ends."""
    if percent <= 0:
        return 999999999.9
    if percent >= 1:
        return 0.0
    return math.exp(math.log(largest) + percent * (math.log(smallest) - math.log(largest)))


def flow(percent, shift=3.0):
    if percent <= 0:
        return 1.0
    if percent >= 1:
        return 0.0
    return shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))


@pytest.mark.parametrize("rule", [log_linear, flow])
def test_both_ends_and_everything_beyond_them_are_0_and_1(rule):
    percent_of = PercentOfSigma(rule)
    assert percent_of(rule(0)) == percent_of(1e12) == percent_of(math.inf) == 0
    assert percent_of(rule(1)) == percent_of(0) == 1
    assert percent_of(rule(1e-12)) == 0 and percent_of(rule(1 - 1e-15)) == 1


def test_the_largest_sigma_that_a_run_really_has_is_the_beginning():
    assert PercentOfSigma(log_linear)(14.6) == pytest.approx(0, abs=1e-6)
    assert PercentOfSigma(log_linear)(0.03) == pytest.approx(1, abs=1e-6)


@given(part)
def test_percent_to_sigma_and_back_is_the_same_percent(percent):
    assert PERCENT_OF[log_linear](log_linear(percent)) == pytest.approx(percent, abs=1e-6)
    assert PERCENT_OF[flow](flow(percent)) == pytest.approx(percent, abs=1e-3)


@given(st.floats(1e-6, 20), st.floats(1e-6, 20))
def test_a_larger_sigma_is_never_later(a, b):
    for percent_of in PERCENT_OF.values():
        assert percent_of(max(a, b)) <= percent_of(min(a, b))


def test_a_rule_with_a_plateau_still_gives_a_rising_percent():
    percent_of = PercentOfSigma(lambda percent: max(0.1, min(10.0, log_linear(percent))))
    sigmas = [20, 10, 9.99, 5, 1, 0.2, 0.11, 0.1, 0.05]
    found = [percent_of(sigma) for sigma in sigmas]
    assert found == sorted(found) and found[0] == found[1] == 0 and found[-1] == found[-2] == 1


PERCENT_OF = {rule: PercentOfSigma(rule) for rule in (log_linear, flow)}


@given(st.lists(part, max_size=10), st.sampled_from([", ", ",", " ", "; ", "\n", "，", "、"]))
def test_numbers_are_read_from_text_with_any_usual_separator(values, separator):
    assert parse_numbers(separator.join(map(repr, values)), 0, 1, "Node: gates") == tuple(values)


@pytest.mark.parametrize("text", ["", "  ", ",;\n"])
def test_empty_text_has_no_numbers(text):
    assert parse_numbers(text, 0, 1, "Node: gates") == ()


@pytest.mark.parametrize("word", ["a", "1.5", "-0.1", "nan", "inf", "0.5x", "0.5.5"])
def test_a_word_that_is_no_number_in_range_is_named(word):
    with pytest.raises(ValueError, match=f"^Node: gates must be numbers from 0 to 1 .*such as 0, 0.5, 1; got '{word}'"):
        parse_numbers(f"0, {word}", 0, 1, "Node: gates")
    with pytest.raises(ValueError, match="^Node: strengths must be numbers from 0 to 5 .*such as 0, 2.5, 5; got '6'"):
        parse_numbers("6", 0, 5, "Node: strengths")


def test_too_many_numbers_are_refused_with_the_limit():
    assert len(parse_numbers("0.5 " * 64, 0, 1, "Node: gates", most=64)) == 64
    with pytest.raises(ValueError, match="Node: gates has 65 numbers, but at most 64"):
        parse_numbers("0.5 " * 65, 0, 1, "Node: gates", most=64)
    with pytest.raises(ValueError, match="at most 4096"):
        parse_numbers("1 " * 5000, 0, 1, "Node: gates")
