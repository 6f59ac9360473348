"""What ComfyUI leaves unchecked: numbers that come over a wire or are NaN, and latents."""

from __future__ import annotations

import sys
from numbers import Real
from typing import Any

import torch

_ANY = sys.float_info.max


def check_numbers(node: str, low: float, high: float, **numbers: Any) -> None:
    """ValueError, naming node and input, unless all lie between `low` and `high`. NaN passes ComfyUI's own check."""
    for name, value in numbers.items():
        if not isinstance(value, Real) or not low <= float(value) <= high:
            shown = f"{value:g}" if isinstance(value, Real) else type(value).__name__
            within = "" if high >= _ANY else f" from {low:g} to {high:g}"
            raise ValueError(f"{node}: {name} is {shown}, expected a number{within}. Change it.")


def check_finite(node: str, **numbers: Any) -> None:
    check_numbers(node, -_ANY, _ANY, **numbers)


def check_latent(node: str, name: str, latent: Any, model: Any) -> None:
    """ValueError, naming node and input, unless this is a LATENT for the model with at least one picture of numbers."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, torch.Tensor) or samples.ndim < 4 or 0 in samples.shape:
        shape = tuple(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise ValueError(
            f"{node}: {name} has the shape {shape} instead of pictures x channels x height x width. Connect a latent with "
            "at least one picture."
        )
    for part, values in ((name, samples), (f"the noise mask of {name}", latent.get("noise_mask"))):
        if values is not None and not values.isfinite().all():
            raise ValueError(
                f"{node}: {part} contains values that are not numbers (NaN or infinite); the node that made it failed, so use "
                "another one."
            )
    wanted = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != wanted and samples.any():  # ComfyUI gives an empty latent the channels that it needs
        raise ValueError(
            f"{node}: {name} has {samples.shape[1]} channels, but the model works with {wanted}. Use a latent made with the "
            "VAE of the same base."
        )
