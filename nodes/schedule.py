"""FlexIPGateSchedule and FlexIPGateBatch: a gate that changes over the sampling, or over the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui

from ..flexip_core.pictures.plots import Series, line_plot
from ..flexip_core.run.schedule import (
    GRID,
    PRESETS,
    SPREADS,
    GateBatch,
    GateCurve,
    PercentOfSigma,
    parse_numbers,
    preset_curve,
)
from . import notices
from .checks import check_numbers
from .compat import KEEP_PREVIEW, CurveInput
from .types import CONTROL_MENU, FlexIPGate

SCHEDULE = "FlexIPGateSchedule"
BATCH = "FlexIPGateBatch"
WIRED = "wired"
DRAWN = "curve"  # the last preset: what is drawn in, or wired into, the curve input
HAS_CURVES = CurveInput is not None
STRAIGHT = [(0.0, 0.9), (1.0, 0.3)]  # what the editor shows at first


class FlexIPGateSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        slider = {"min": 0.0, "max": 1.0, "step": 0.01, "display_mode": io.NumberDisplay.slider}
        curve = []
        if HAS_CURVES:
            curve.append(
                io.Curve.Input(
                    "curve",
                    socketless=False,
                    optional=True,
                    default=STRAIGHT,
                    tooltip="The gate over the sampling: left is its beginning, right its end, up is 1. Draw it here or wire a Curve Editor. It is used only when preset is 'curve'.",
                )
            )
        return io.Schema(
            node_id=SCHEDULE,
            display_name="FlexIP Gate Schedule",
            category=CONTROL_MENU,
            description="A gate that changes over the sampling, for Apply FlexIP Gate. Layout and identity are decided early, style and detail late. The plot shows the gate at every step.",
            **KEEP_PREVIEW,
            search_aliases=["gate over time", "gate curve", "weight type", "keyframe", "timestep", "schedule"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, *([DRAWN] if HAS_CURVES else [])],
                    default="identity first",
                    tooltip="identity first: the higher gate, then the lower one. style first: the other way round. linear and ease go from start to end; constant stays at start; curve is drawn below.",
                ),
                io.Float.Input(
                    "start",
                    default=0.9,
                    **slider,
                    tooltip="Gate at the beginning. 1 keeps the subject, 0 follows the prompt. 'identity first' and 'style first' order start and end themselves.",
                ),
                io.Float.Input("end", default=0.3, **slider, tooltip="Gate at the end of the sampling."),
                *curve,
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only for the plot, together with sigmas: the model, which says which part of the sampling each sigma belongs to.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Only for the plot: the sigmas of the run, for example from Basic Scheduler, to see the gate of every step.",
                ),
            ],
            outputs=[FlexIPGate.Output("gate", display_name="gate", tooltip="For gate_schedule of Apply FlexIP Gate.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        preset: str,
        start: float,
        end: float,
        curve: Any = None,
        model: Any = None,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        check_numbers(SCHEDULE, 0, 1, start=start, end=end)
        gate = drawn_curve(curve) if preset == DRAWN else preset_curve(preset, start, end)
        title = gate.name
        if preset != DRAWN and (made := _made(curve)):
            title += f" (the {made} curve is not used)"
            if made == WIRED:  # whoever drew one may have switched to a preset since; a wire is meant to be used
                notices.warn(
                    f"the {made} curve is not used, because preset is '{preset}'; set preset to 'curve' to use it",
                    notices.id_of(cls),
                )
        return io.NodeOutput(gate, ui=ui.PreviewImage(preview(gate, title, model, sigmas), cls=cls))


def drawn_curve(curve: Any) -> GateCurve:
    """From what the curve input holds: the editor's own form, or a CurveInput from a wire.

    Between the points a curve may be smooth, so it is read at every percent and at its own points.
    """
    try:
        curve = CurveInput.from_raw(curve)
        percents = np.array(sorted({*GRID, *(x for x, _ in curve.points if 0.0 <= x <= 1.0)}))
        gates = curve.interp_array(percents) if curve.points else np.array([np.nan])
    except (AttributeError, KeyError, TypeError, ValueError):
        gates = np.array([np.nan])
    if not np.isfinite(gates).all():
        raise ValueError(
            f"{SCHEDULE}: expected a curve with at least one point, got none. Draw one, or choose another preset."
        )
    if gates.min() < -1e-6 or gates.max() > 1 + 1e-6:
        raise ValueError(
            f"{SCHEDULE}: the curve runs from {gates.min():g} to {gates.max():g}, but a gate lies between 0 and 1. Keep all points of the curve between 0 and 1."
        )
    return GateCurve(tuple(zip(percents.tolist(), gates.clip(0.0, 1.0).tolist())), DRAWN)


def _made(curve: Any) -> str:
    """How it was made; empty for none, or for the one that the editor shows at first."""
    if not isinstance(curve, (dict, list, tuple)):
        return "" if curve is None else WIRED
    points = curve.get("points") if isinstance(curve, dict) else curve
    return "" if points and [tuple(point) for point in points] == STRAIGHT else "drawn"


def preview(gate: GateCurve, title: str, model: Any, sigmas: torch.Tensor | None) -> torch.Tensor:
    """The plot: a dot per step where the sigmas of the run are known, otherwise the curve itself."""
    if sigmas is None:
        line = Series("gate", GRID, [gate(percent) for percent in GRID])
        return line_plot([line], "part of the sampling", "gate", title, x_range=(0, 1), y_range=(0, 1))
    if model is None:
        raise ValueError(
            f"{SCHEDULE}: sigmas are wired without a model, and the model decides which part of the sampling a sigma belongs to. Wire the model too, or remove the sigmas."
        )
    gates = step_gates(gate, model, sigmas)
    label = f"step (sigma {sigmas[0]:.3g} to {sigmas[-1]:.3g})" if gates else "step"
    line = Series("gate", range(1, len(gates) + 1), gates, points=True)
    return line_plot([line], label, "gate", title, y_range=(0, 1))


def step_gates(gate: GateCurve, model: Any, sigmas: torch.Tensor) -> list[float]:
    """The gate of each step; a step begins at its sigma, and the last step ends at the last sigma."""
    percent_of = PercentOfSigma(model.get_model_object("model_sampling").percent_to_sigma)
    return [gate(percent_of(sigma)) for sigma in sigmas[:-1].tolist()]


class FlexIPGateBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=BATCH,
            display_name="FlexIP Gate Batch",
            category=CONTROL_MENU,
            description="A separate gate for every picture of a batch, or every frame of a video, for Apply FlexIP Gate.",
            search_aliases=["gate per frame", "batch gate", "keyframe", "video", "animatediff", "frames"],
            inputs=[
                io.String.Input(
                    "gates",
                    default="1, 0.2",
                    tooltip="Gates from 0 to 1 with commas between them, such as 1, 0.2. 1 keeps the subject, 0 follows the prompt.",
                ),
                io.Combo.Input(
                    "spread",
                    options=list(SPREADS),
                    default="interpolate",
                    tooltip="interpolate: the gates are key frames, evenly spread from the first picture to the last. repeat: one gate per picture, starting again when they are used up.",
                ),
            ],
            outputs=[FlexIPGate.Output("gate", display_name="gate", tooltip="For gate_schedule of Apply FlexIP Gate.")],
        )

    @classmethod
    def execute(cls, gates: str, spread: str) -> io.NodeOutput:
        values = parse_numbers(gates, 0.0, 1.0, f"{BATCH}: gates")
        if not values:
            raise ValueError(f"{BATCH}: gates is empty. Write one or more numbers from 0 to 1, such as 1, 0.2.")
        return io.NodeOutput(GateBatch(values, spread))
