"""What could let single pictures move evenly: the same adapters, with the dial turned in another way. And whether a jump really is one.

A cure that removes the range along with the jump is no cure, so each is shown with what it leaves of the gate's range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..measuring import smoothness
from ..network.adapters import ADAPTERS, FlexIPNetwork
from . import measure
from .base import MiniBase
from .causes import all_but, growing, late, only
from .measure import Instruments, Setup, Sweep
from .sampling import Dial, everywhere

OTHER_PICTURES = 1000  # added to the seeds of the pictures that a cure may learn from
RANGES = ("identity", "corner_copied", "dino_i")
FINER, FEW = 10, 16  # gates per interval, and cases, of the look between two gates


def variants(network: FlexIPNetwork, setup: Setup, evened: tuple[float, ...]) -> dict[str, tuple[Dial, Setup]]:
    # causes.py: the first block alone decides where the subject is, the last its colours
    first, *_, last = network.block_widths
    return {
        "the gate as it is": (everywhere, setup),
        "gates spaced by how far other pictures move": (everywhere, dataclasses.replace(setup, gates=evened)),
        "the gate grows over the first half of the sampling": (growing, setup),
        "the gate acts after the first quarter only": (late, setup),
        f"the gate acts in all blocks but {first}": (all_but(first), setup),
        f"the gate acts in {last} only": (only(last), setup),
    }


def measured(
    base: MiniBase,
    network: FlexIPNetwork,
    tools: Instruments,
    setup: Setup,
    mode: str,
    adapters: Iterable[str] = ADAPTERS,
) -> dict[str, Any]:
    """Cure -> evenness of single pictures and the ranges that are left; and the look between two gates."""

    def swept(its_setup: Setup, dial: Dial = everywhere) -> Sweep:
        return measure.gate_sweep(base, network, mode, tools, its_setup, adapters, dial)

    others = dataclasses.replace(
        setup, test_seed=setup.test_seed + OTHER_PICTURES, noise_seed=setup.noise_seed + OTHER_PICTURES
    )
    evened = evenly_spaced(swept(others).features, setup.gates)
    out: dict[str, Any] = {"evened_gates": [round(gate, 4) for gate in evened]}
    for name, (dial, its_setup) in variants(network, setup, evened).items():
        out[name] = numbers(swept(its_setup, dial))
    few = dataclasses.replace(setup, cases=FEW, gates=finer(setup.gates))
    out["between"] = between(swept(few).features)
    return out


def numbers(result: Sweep) -> dict[str, Any]:
    way = (result.features[1:] - result.features[:-1]).norm(dim=-1)
    ratios = smoothness.step_ratios(result.features)
    return {
        "per_image_feature_step": ratios.mean().item(),
        "p99": ratios.quantile(0.99).item(),
        "largest_step": way.amax(0).mean().item(),
        "whole_way": way.sum(0).mean().item(),
        "identity_jump_share": smoothness.jump_share(result.curve("identity")),
        **{f"{name}_range": (result.curve(name)[-1] - result.curve(name)[0]).item() for name in RANGES},
    }


def evenly_spaced(features: Tensor, gates: tuple[float, ...]) -> tuple[float, ...]:
    """(g, n, f) at `gates` -> as many gates, between which the mean picture moves equally far."""
    places = torch.tensor(gates, dtype=torch.float64)
    way = (features[1:] - features[:-1]).norm(dim=-1).mean(1).double().cumsum(0)
    way = torch.cat([way.new_zeros(1), way])
    wanted = torch.linspace(0, way[-1].item(), len(gates), dtype=torch.float64)
    return tuple(smoothness.interpolated(places[:, None], way, wanted)[:, 0].clamp(0, 1).tolist())


def finer(gates: tuple[float, ...]) -> tuple[float, ...]:
    places = torch.tensor(gates, dtype=torch.float64)
    at = torch.linspace(0, len(gates) - 1, FINER * (len(gates) - 1) + 1, dtype=torch.float64)
    numbered = torch.arange(len(gates), dtype=torch.float64)
    return tuple(smoothness.interpolated(places[:, None], numbered, at)[:, 0].tolist())


def between(features: Tensor) -> dict[str, float]:
    """(FINER * (g - 1) + 1, n, f) -> of each case's largest step between two gates: how much of it lies in one of its FINER parts.

    1 / FINER if the picture moves evenly there, 1 if it jumps.
    """
    coarse = features[::FINER]
    at = smoothness.largest_step_at(coarse)
    parts = (features[1:] - features[:-1]).norm(dim=-1).unfold(0, FINER, FINER).amax(-1)  # (g - 1, n)
    cases = torch.arange(features.shape[1])
    share = parts[at, cases] / (coarse[1:] - coarse[:-1]).norm(dim=-1)[at, cases]
    return {
        "largest_part": share.mean().item(),
        "median": share.median().item(),
        "jumps": (share > 0.5).double().mean().item(),
    }
