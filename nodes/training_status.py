"""FlexIPTrainingStatus: looks at a training run of FlexIPTrain, and stops it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui
from PIL import Image

from ..flexip_core.pictures.plots import Series, line_plot
from . import notices
from .errors import named
from .train import run_folder, trainer
from .types import TRAIN_MENU

STATUS = "FlexIPTrainingStatus"
PLOT = (560, 320)
LOOK, STOP = "look", "stop"
MOST_PIXELS = 2**26  # of a preview
MOST_RUNS = 20  # that are listed
_stops: dict[Path, str | None] = {}  # runs that a prompt asked to stop, and which prompt it was


class FlexIPTrainingStatus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=STATUS,
            display_name="FlexIP Training Status",
            category=TRAIN_MENU,
            description="Shows how far a training run has come, its losses and its newest preview pictures, lists the other runs, and stops a run on request. Queue it as often as you like.",
            search_aliases=["training progress", "loss", "stop training", "training preview"],
            is_experimental=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input(
                    "run", default="my_adapters", tooltip="The run's name; wire it from Train FlexIP, or type it."
                ),
                io.Combo.Input(
                    "action",
                    options=[LOOK, STOP],
                    tooltip="stop: the run saves its state and ends after the step it is in. Queue it twice in a row, so that no workflow from elsewhere can stop a run. Queue Train FlexIP again to continue.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "report", display_name="report", tooltip="State, step, time left, losses, the probe's scores."
                ),
                io.Image.Output(
                    "losses", display_name="losses", tooltip="The loss of both kinds of data over the steps."
                ),
                io.Image.Output(
                    "preview",
                    display_name="preview",
                    tooltip="The newest preview: per row a reference, then gate 0, 0.5 and 1. Grey before the first one.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        return time.time()  # the run goes on between two looks

    @classmethod
    def execute(cls, run: str, action: str) -> io.NodeOutput:
        background = trainer().background
        folder = run_folder(run, STATUS)
        with named(STATUS):
            if action == LOOK:
                _stops.pop(folder, None)
            meant = action == STOP and (not background.is_running(folder) or is_meant(folder, _prompt_id()))
            if meant:
                background.ask_to_stop(folder)
            found = background.status(folder)
            losses, preview = loss_plot(found.losses), preview_of(found.previews)
        text = found.text()
        warnings: tuple[str, ...] = ()
        if meant:
            text += "\nIt was asked to stop: it saves its state after the step it is in."
        elif action == STOP:
            warnings = (f"to stop {folder.name}, queue this node once more with action stop",)
        text += others_in_words(background, folder)
        shown = ui.PreviewImage(losses, cls=cls).as_dict()
        if found.previews:  # each at its own size
            shown["images"] = [*shown["images"], *ui.PreviewImage(preview, cls=cls).values]
        said = dataclasses.replace(notices.Report.of(text), warnings=warnings)
        return io.NodeOutput(said.text, losses, preview, ui={**shown, **notices.said(said, notices.id_of(cls))})


def loss_plot(lines: tuple[dict[str, Any], ...]) -> torch.Tensor:
    kinds = lines[-1]["loss_by_kind"] if lines else {}
    series = [
        Series(
            kind,
            [line["step"] for line in lines if line["loss_by_kind"][kind] is not None],
            [line["loss_by_kind"][kind] for line in lines if line["loss_by_kind"][kind] is not None],
        )
        for kind in kinds
        if any(line["loss_by_kind"][kind] is not None for line in lines)
    ]
    return line_plot(series, "step", "loss", "loss by kind of data", PLOT)


def preview_of(previews: tuple[Path, ...]) -> torch.Tensor:
    """(1, h, w, 3) in 0..1"""
    if not previews:
        return torch.full((1, PLOT[1], PLOT[0], 3), 0.5)
    name = previews[-1].name
    try:
        with Image.open(previews[-1], formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(
                    f"the preview {name} has {image.width} x {image.height} pixels; take it out of the run's folder."
                )
            return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"the preview {name} is not a PNG that can be read ({error}); take it out of the run's folder."
        ) from None


def is_meant(folder: Path, prompt: str | None) -> bool:
    """Whether the prompt before this one asked to stop the run, too: a workflow from elsewhere may hold stop without your wish."""
    if folder not in _stops or (prompt is not None and _stops[folder] == prompt):
        _stops[folder] = prompt
        return False
    del _stops[folder]
    return True


def _prompt_id() -> str | None:
    from server import PromptServer

    return getattr(getattr(PromptServer, "instance", None), "last_prompt_id", None)


def others_in_words(background: Any, folder: Path) -> str:
    """The other runs, those that are being trained first, a sentence each."""
    found = [(background.is_running(other), other) for other in background.runs(folder.parent) if other != folder]
    found = sorted(found, key=lambda one: not one[0])
    lines = [
        f"Another run: {other.name}{', which is being trained' if live else ''}." for live, other in found[:MOST_RUNS]
    ]
    lines += [f"And {len(found) - MOST_RUNS} more."] if len(found) > MOST_RUNS else []
    return "".join(f"\n{line}" for line in lines)
