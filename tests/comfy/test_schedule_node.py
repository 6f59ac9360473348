"""FlexIPGateSchedule and FlexIPGateBatch, with ComfyUI's own model samplings, schedulers and curves."""

import itertools
import logging
from types import SimpleNamespace

import comfy.samplers
import comfy.utils
import comfy_api.input
import folder_paths
import numpy as np
import pytest
import tiny
import torch
from comfy import model_sampling
from comfy_extras.nodes_custom_sampler import BasicScheduler
from flexip_pack.flexip_core.run.schedule import GRID, PRESETS, GateBatch, GateCurve, PercentOfSigma, preset_curve
from flexip_pack.nodes import notices, schedule
from flexip_pack.nodes.compat import CurveInput
from flexip_pack.nodes.schedule import FlexIPGateBatch, FlexIPGateSchedule, preview, step_gates
from hypothesis import given
from hypothesis import strategies as st
from pairs import in_turn
from PIL import Image

LinearCurve = getattr(comfy_api.input, "LinearCurve", None)
needs_curves = pytest.mark.skipif(CurveInput is None, reason="this ComfyUI has no curves")
SCHEDULERS = ["normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform", "beta", "kl_optimal"]


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(autouse=True)
def temp(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return tmp_path


def gate_of(*args, **kwargs):
    return FlexIPGateSchedule.execute(*args, **kwargs).args[0]


def sigmas_for(model, scheduler="normal", steps=8, denoise=1.0):
    return BasicScheduler.execute(model, scheduler, steps, denoise).args[0]


def drawn(points, interpolation="monotone_cubic"):
    """What the curve editor of the page sends."""
    return {"points": [list(point) for point in points], "interpolation": interpolation}


SAMPLINGS = {
    "discrete": model_sampling.ModelSamplingDiscrete(),
    "zero terminal SNR": model_sampling.ModelSamplingDiscrete(zsnr=True),
    "EDM": model_sampling.ModelSamplingContinuousEDM(),
    "flow": model_sampling.ModelSamplingDiscreteFlow(SimpleNamespace(sampling_settings={"shift": 3.0})),
    "flux": model_sampling.ModelSamplingFlux(),
}
PERCENT_OF = {name: PercentOfSigma(sampling.percent_to_sigma) for name, sampling in SAMPLINGS.items()}


@given(st.sampled_from(sorted(SAMPLINGS)), st.floats(0, 1))
def test_percent_to_sigma_and_back_is_the_same_percent(name, percent):
    sigma = float(SAMPLINGS[name].percent_to_sigma(percent))
    assert PERCENT_OF[name](sigma) == pytest.approx(percent, abs=1e-3)


@given(st.sampled_from(sorted(SAMPLINGS)), st.floats(0, 200), st.floats(0, 200))
def test_a_larger_sigma_is_never_later(name, a, b):
    assert PERCENT_OF[name](max(a, b)) <= PERCENT_OF[name](min(a, b))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_both_ends_are_exact_also_for_the_sigmas_that_a_run_has(name):
    percent_of, sampling = PERCENT_OF[name], SAMPLINGS[name]
    assert percent_of(999999999.9) == 0 and percent_of(float(sampling.percent_to_sigma(0.0))) == 0
    assert percent_of(0.0) == 1
    assert percent_of(float(sampling.sigma_max)) == pytest.approx(0, abs=1e-3)
    assert percent_of(float(sampling.sigma_min)) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_window_in_percent_and_the_curve_agree_about_where_a_sigma_is(name):
    """start_percent is compared in sigmas, the curve in percents; both must switch at the same place."""
    edge = float(SAMPLINGS[name].percent_to_sigma(0.35))
    assert PERCENT_OF[name](edge * 1.01) < 0.35 < PERCENT_OF[name](edge * 0.99)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_its_curve(preset):
    assert gate_of(preset, 0.8, 0.1) == preset_curve(preset, 0.8, 0.1)


@needs_curves
def test_every_option_works_with_the_defaults_of_the_page():
    inputs = {i.id: i for i in FlexIPGateSchedule.define_schema().inputs}
    default = inputs["curve"].as_dict()["default"]
    assert inputs["preset"].options[-1] == "curve"
    for preset in inputs["preset"].options:
        curve = gate_of(preset, inputs["start"].default, inputs["end"].default, default)
        assert isinstance(curve, GateCurve)
        assert curve(0) == pytest.approx(0.3 if preset == "style first" else 0.9)


@needs_curves
@pytest.mark.parametrize("interpolation", ["monotone_cubic", "linear"])
def test_a_drawn_curve_is_what_cores_editor_shows(interpolation):
    raw = drawn([(0, 1), (0.123, 0.2), (0.5, 0.9), (0.777, 0)], interpolation)
    curve, core = gate_of("curve", 0, 0, raw), CurveInput.from_raw(raw)
    for percent in np.linspace(0, 1, 333):
        assert curve(percent) == pytest.approx(core.interp(percent), abs=5e-3)
    for x, y in core.points:
        assert curve(x) == pytest.approx(y, abs=1e-12)


@needs_curves
def test_a_wired_curve_counts_when_the_preset_is_curve():
    curve = gate_of("curve", 0, 0, LinearCurve([(0.25, 0.1), (0.75, 0.6)]))
    assert [curve(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0.1, 0.1, 0.35, 0.6, 0.6])


@needs_curves
def test_a_curve_with_two_values_at_one_place_is_a_step():
    curve = gate_of("curve", 0, 0, LinearCurve([(0, 1), (0.5, 1), (0.5, 0), (1, 0)]))
    assert curve(0.48) == 1 and curve(0.52) == 0


@needs_curves
def test_with_another_preset_a_curve_that_somebody_made_changes_nothing_and_is_mentioned(caplog, temp, monkeypatch):
    told, expected = [], preset_curve("linear", 0.9, 0.3)
    monkeypatch.setattr(notices, "_send_warnings", lambda report, node_id: told.extend(report.warnings))
    with caplog.at_level(logging.WARNING):
        assert gate_of("linear", 0.9, 0.3, drawn([(0, 0.9), (1, 0.3)])) == expected
        assert told == []
        assert gate_of("linear", 0.9, 0.3, drawn([(0, 0), (1, 1)])) == expected
        assert not caplog.records
        assert gate_of("linear", 0.9, 0.3, LinearCurve([(0, 0), (1, 1)])) == expected
    assert "the wired curve is not used" in caplog.text
    assert told == ["the wired curve is not used, because preset is 'linear'; set preset to 'curve' to use it"]
    first, second, third = pictures(temp)
    assert not np.array_equal(first, second) and not np.array_equal(second, third)  # their plots say so


@pytest.mark.parametrize("curve", [None, drawn([]), {}, {"points": [[0]]}, {"points": [[0, "x"]]}, "curve", 7])
def test_a_curve_that_is_none_is_refused(curve):
    with pytest.raises(ValueError, match="FlexIPGateSchedule: expected a curve with at least one point"):
        gate_of("curve", 0.9, 0.3, curve)


@needs_curves
def test_a_curve_outside_0_to_1_is_refused_with_its_range():
    with pytest.raises(ValueError, match="FlexIPGateSchedule: the curve runs from -0.5 to 1.5"):
        gate_of("curve", 0.9, 0.3, LinearCurve([(0, -0.5), (1, 1.5)]))


@needs_curves
def test_a_curve_that_is_drawn_beside_the_sampling_counts_only_inside():
    curve = gate_of("curve", 0, 0, LinearCurve([(-1, 0), (1, 1)]))
    assert (curve(0), curve(1)) == (0.5, 1) and curve.points[0][0] == 0


class Recorder:
    """A model whose UNet calls are seen."""

    def __init__(self, model):
        self.sigmas = []
        self.model = model.clone()
        self.model.set_model_unet_function_wrapper(self)

    def __call__(self, apply_model, args):
        self.sigmas.append(float(args["timestep"][0]))
        return apply_model(args["input"], args["timestep"], **args["c"])


@pytest.mark.parametrize("scheduler, denoise", in_turn(SCHEDULERS, [1.0, 0.4]))
def test_the_plotted_gates_are_those_of_the_sigmas_that_the_unet_gets(model, scheduler, denoise):
    recorder, curve = Recorder(model), preset_curve("linear", 1, 0)
    sigmas = sigmas_for(model, scheduler, 5, denoise)
    guider = comfy.samplers.CFGGuider(recorder.model)
    guider.set_conds(tiny.cond(1), tiny.cond(2))
    guider.set_cfg(1.0)
    noise = tiny.noise_for()
    guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
    )
    percent_of = PercentOfSigma(recorder.model.get_model_object("model_sampling").percent_to_sigma)
    gates = step_gates(curve, model, sigmas)
    assert len(gates) == len(sigmas) - 1
    assert gates == pytest.approx([curve(percent_of(sigma)) for sigma in recorder.sigmas], abs=1e-5)
    assert all(a > b for a, b in itertools.pairwise(gates))


def test_with_denoise_the_run_begins_where_that_part_of_the_sampling_begins(model):
    gates = step_gates(preset_curve("linear", 1, 0), model, sigmas_for(model, "sgm_uniform", 20, 0.5))
    assert gates[0] == pytest.approx(0.5, abs=0.03) and gates[-1] < 0.1


def test_a_run_in_two_stages_goes_along_one_curve(model):
    curve, sigmas = preset_curve("ease in", 1, 0), sigmas_for(model, "karras", 12)
    stages = step_gates(curve, model, sigmas[:6]) + step_gates(curve, model, sigmas[5:])
    assert stages == step_gates(curve, model, sigmas)


def test_the_number_of_steps_changes_nothing_at_a_sigma(model):
    curve = preset_curve("ease in-out", 0.9, 0.2)
    few, many = sigmas_for(model, "simple", 5), sigmas_for(model, "simple", 50)
    at = dict(zip(many.tolist(), step_gates(curve, model, many)))
    shared = [(gate, at[sigma]) for sigma, gate in zip(few.tolist(), step_gates(curve, model, few)) if sigma in at]
    assert len(shared) >= 3 and all(a == b for a, b in shared)


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)]


BLUE = (0, 114, 178)


def dots(picture):
    """Columns of the line's colour that lie in a dot: blobs higher than the line is thick."""
    blue = (np.abs(picture.astype(int) - BLUE).max(-1) < 12).sum(0)
    thick = np.flatnonzero(blue >= 5)
    return 1 + int((np.diff(thick) > 3).sum()) if len(thick) else 0


def test_the_preview_has_a_dot_per_step_of_the_wired_sigmas(model, temp):
    output = FlexIPGateSchedule.execute("constant", 0.5, 0.3, None, model, sigmas_for(model, "karras", 9, 0.6))
    assert output.ui.as_dict()["images"][0]["type"] == "temp"
    (picture,) = pictures(temp)
    assert picture.shape == (320, 480, 3) and dots(picture) == 9


@pytest.mark.parametrize("wired", [False, True])
def test_without_sigmas_the_preview_is_the_curve_over_the_sampling(model, temp, wired):
    FlexIPGateSchedule.execute("identity first", 0.9, 0.3, None, model if wired else None)
    (picture,) = pictures(temp)
    expected = preview(preset_curve("identity first", 0.9, 0.3), "identity first, 0.9 to 0.3", None, None)
    np.testing.assert_allclose(picture / 255, expected[0].numpy(), atol=1 / 255)
    rows, columns = np.nonzero(np.abs(picture.astype(int) - BLUE).max(-1) < 12)
    assert rows[columns < columns.min() + 20].mean() < rows[columns > columns.max() - 20].mean() - 100


def test_the_preview_of_a_step_is_at_the_height_of_its_gate(model):
    sigmas = sigmas_for(model, "normal", 6)
    curve = preset_curve("linear", 1, 0)
    line = preview(curve, "", model, sigmas)[0].numpy() * 255
    rows, columns = np.nonzero(np.abs(line - BLUE).max(-1) < 12)
    ends = [rows[columns <= columns.min() + 2].mean(), rows[columns >= columns.max() - 2].mean()]
    full = preview(curve, "", None, None)[0].numpy() * 255
    all_rows, _ = np.nonzero(np.abs(full - BLUE).max(-1) < 12)
    top, bottom = all_rows.min(), all_rows.max()
    gates = step_gates(curve, model, sigmas)
    for row, gate in zip(ends, (gates[0], gates[-1])):
        assert (bottom - row) / (bottom - top) == pytest.approx(gate, abs=0.03)


def test_sigmas_without_a_model_are_refused(model):
    with pytest.raises(ValueError, match="FlexIPGateSchedule: sigmas are wired without a model.*Wire the model"):
        gate_of("linear", 0.9, 0.3, None, None, sigmas_for(model))


@pytest.mark.parametrize("sigmas", [torch.FloatTensor([]), torch.tensor([14.6]), torch.tensor([14.6, 0.0])])
def test_runs_of_no_step_or_one_step_have_a_preview(model, temp, sigmas):
    gate_of("linear", 0.9, 0.3, None, model, sigmas)
    assert dots(pictures(temp)[0]) == max(0, len(sigmas) - 1)


def test_sigmas_that_go_up_again_are_plotted_as_they_come(model):
    sigmas = sigmas_for(model, "normal", 5)
    curve = preset_curve("linear", 1, 0)
    up_and_down = torch.cat([sigmas, sigmas.flip(0)])
    gates = step_gates(curve, model, up_and_down)
    assert gates[0] == pytest.approx(gates[-1], abs=0.3) and min(gates) == gates[len(sigmas) - 1] == 0


def test_a_batch_of_gates_is_read_from_text():
    assert FlexIPGateBatch.execute("1, 0.2", "interpolate").args == (GateBatch((1.0, 0.2), "interpolate"),)
    assert FlexIPGateBatch.execute("0.1；0.5，1", "repeat").args == (GateBatch((0.1, 0.5, 1.0), "repeat"),)


@pytest.mark.parametrize("text, words", [("", "gates is empty"), ("0, 2", "from 0 to 1.*'2'"), ("a", "'a'")])
def test_a_batch_of_something_else_is_a_sentence(text, words):
    with pytest.raises(ValueError, match=f"FlexIPGateBatch: gates.*{words.removeprefix('gates')}"):
        FlexIPGateBatch.execute(text, "repeat")


def test_the_batch_repeats_as_core_repeats():
    values = torch.tensor([0.1, 0.5, 1.0])
    for batch in (1, 2, 3, 7):
        expected = comfy.utils.repeat_to_batch_size(values, batch)
        got = GateBatch(tuple(values.tolist()), "repeat").values_for(batch)
        assert got == tuple(expected.tolist())


@needs_curves
def test_the_schemas_name_the_frozen_options():
    over_time, batch = FlexIPGateSchedule.define_schema(), FlexIPGateBatch.define_schema()
    assert [i.id for i in over_time.inputs] == ["preset", "start", "end", "curve", "model", "sigmas"]
    assert [i.id for i in batch.inputs] == ["gates", "spread"]
    assert {o.get_io_type() for o in (*over_time.outputs, *batch.outputs)} == {"FLEXIP_GATE"}
    curve = over_time.inputs[3].as_dict()
    assert curve["socketless"] is False and curve["default"]["points"] == [[0.0, 0.9], [1.0, 0.3]]


def test_where_core_has_no_curves_the_node_has_none_either(monkeypatch):
    monkeypatch.setattr(schedule, "HAS_CURVES", False)
    inputs = {i.id: i for i in FlexIPGateSchedule.define_schema().inputs}
    assert "curve" not in inputs and inputs["preset"].options == list(PRESETS)
    assert FlexIPGateSchedule.execute(preset="linear", start=1.0, end=0.0).args[0](GRID[50]) == pytest.approx(0.5)
