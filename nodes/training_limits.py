"""How much of the machine a training may take when a workflow starts it, since a workflow may come from anywhere."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management as mm
import torch

LIMITS = {  # of the inputs, and of `settings`; training.config.check_task has those of [task]
    "steps": (1, 10_000_000),
    "batch": (1, 4096),
    "seed": (0, 0xFFFFFFFF),
    "optimizer.lr": (1e-7, 1.0),
    "keep": (1, 20),
    **{f"network.{name}": (1, 1024) for name in ("detail_tokens", "semantic_tokens", "cls_tokens")},
    **{f"network.resampler.{name}": (1, 8192) for name in ("width", "heads", "dim_head")},
    **{f"network.resampler.{name}": (1, 64) for name in ("depth", "ff_mult")},
}
MOST_STATES = 100  # that a run writes one after the other, unless there are as many steps between them
MOST_LINES = 200_000  # of its log


def refuse_beyond_limits(cfg: Any, device: torch.device) -> None:
    """ValueError for a setting that takes more of the machine than a workflow from elsewhere may. `device`: that it names."""
    for name, (least, most) in LIMITS.items():
        value = cfg
        for part in name.split("."):
            value = getattr(value, part)
        if not least <= value <= most:
            raise ValueError(f"{name} must be within {least:g} and {most:g} in a graph, got {value:g}.")
    if not _is_here(device):
        raise ValueError(f"device must be one of this machine, got {cfg.device}.")
    states = min(MOST_STATES, math.ceil(cfg.steps / MOST_STATES))
    lines = math.ceil(cfg.steps / MOST_LINES)
    for name, least in (("checkpoint_every", states), ("probe_every", states), ("log_every", lines)):
        if getattr(cfg, name) < least:
            raise ValueError(
                f"{name} must be at least {least} in a graph, got {getattr(cfg, name)}; each takes space on the disk."
            )


def _is_here(device: torch.device) -> bool:
    """Whether it is ComfyUI's device or another of this machine: one run per device is no limit where devices are made up."""
    count = getattr(getattr(torch, device.type, None), "device_count", lambda: 0)
    return device == mm.get_torch_device() or (device.index or 0) < count()
