"""What differs between the ComfyUI versions that the pack runs on: asked here, of ComfyUI itself, and nowhere else."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Any

import comfy.sample
import torch
from comfy_api.v0_0_2 import io

try:
    from comfy_api.input import CurveInput
except ImportError:  # not in 0.18; its io.Curve has no editor and nothing that reads the points
    CurveInput = None

# For io.Schema: the node's picture survives a page reload. Before ComfyUI had this, it is gone until the next run.
_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}
KEEP_PREVIEW = {"has_intermediate_output": True} if "has_intermediate_output" in _FIELDS else {}

# What an empty latent says of its scale, as far as this core asks for it: 0.18 knows of the spatial ratio only.
_RATIOS = [p for p in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters if p.startswith("downscale")]


def with_channels_of(model: Any, latent: dict) -> torch.Tensor:
    """The latent's samples; an empty latent gets the channels and the size that the model wants."""
    ratios = {name: latent.get(name) for name in _RATIOS}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


def is_within_directory(directory: str, target: str) -> bool:
    """Whether `target`, with all links followed, lies in `directory`; folder_paths has this from 0.27 on."""
    try:
        directory, target = os.path.realpath(directory), os.path.realpath(target)
        return os.path.commonpath((directory, target)) == directory
    except ValueError:  # another drive, or a name with a zero byte
        return False
