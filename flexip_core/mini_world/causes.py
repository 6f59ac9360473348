"""Where a single picture jumps while the gate moves evenly: the same sweep with the gate moving in parts of the sampling only.

What does not move stays at gate 0.5, so every variant passes through the same picture there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..measuring import smoothness
from ..network.adapters import ADAPTERS, FlexIPNetwork
from . import measure
from .base import MiniBase
from .measure import Instruments, Setup
from .sampling import Dial, everywhere

MIDDLE = 0.5
EARLY = 0.25  # share of the sampling in which layouts are decided


def early(gate: float, done: float, block: str) -> float:
    return gate if done < EARLY else MIDDLE


def late(gate: float, done: float, block: str) -> float:
    return gate if done >= EARLY else MIDDLE


def growing(gate: float, done: float, block: str) -> float:
    """From the middle at the first step to the whole gate at half of the sampling."""
    return MIDDLE + (gate - MIDDLE) * min(1.0, 2 * done)


def only(address: str) -> Dial:
    return lambda gate, done, block: gate if block == address else MIDDLE


def all_but(address: str) -> Dial:
    return lambda gate, done, block: MIDDLE if block == address else gate


def variants(network: FlexIPNetwork, setup: Setup) -> dict[str, tuple[Dial, Setup]]:
    finer = dataclasses.replace(setup, steps=4 * setup.steps)
    unguided = dataclasses.replace(setup, cfg=1.0)
    found = {
        "the gate as it is": (everywhere, setup),
        f"{finer.steps} steps": (everywhere, finer),
        "without guidance": (everywhere, unguided),
        f"moving in the first {EARLY:.0%} only": (early, setup),
        f"moving after the first {EARLY:.0%} only": (late, setup),
        "moving more and more until half": (growing, setup),
    }
    for block in network.block_widths:
        found[f"moving in {block} only"] = (only(block), setup)
    for block in network.block_widths:
        found[f"moving in all but {block}"] = (all_but(block), setup)
    return found


def measured(
    base: MiniBase,
    network: FlexIPNetwork,
    tools: Instruments,
    setup: Setup,
    mode: str,
    adapters: Iterable[str] = ADAPTERS,
) -> dict[str, dict[str, Any]]:
    """Variant -> evenness of single pictures, and what is left of the gate's range."""
    out = {}
    for name, (dial, its_setup) in variants(network, setup).items():
        result = measure.gate_sweep(base, network, mode, tools, its_setup, adapters, dial)
        steps = (result.features[1:] - result.features[:-1]).norm(dim=-1)
        out[name] = {
            "per_image_feature_step": smoothness.step_ratios(result.features).mean().item(),
            "largest_step": steps.amax(0).mean().item(),
            "whole_way": steps.sum(0).mean().item(),
            "identity": [round(v, 4) for v in result.curve("identity").tolist()],
            "corner_copied": [round(v, 4) for v in result.curve("corner_copied").tolist()],
            "dino_i": [round(v, 4) for v in result.curve("dino_i").tolist()],
        }
    return out
