"""The loss on data that is never trained on, by kind and quartile of the timestep, always on the same draws.

Training's own losses move with what was drawn; these move with the weights alone. They say whether a run still learns or only
learns its pictures by heart, not how good the adapters are: for that there is the probe.
"""

from __future__ import annotations

from typing import Any

import torch

from ..network.adapters import FlexIPNetwork
from .config import DropoutConfig, TrainConfig
from .data import ALL, INVARIANT, VARIANT, PairSource
from .draws import draw_gates, generator
from .forward import Forward
from .losses import Meter

SEED = 2718
NOTHING_DROPPED = DropoutConfig(image=0, text=0, both=0, phrase=0)


@torch.no_grad()
def validation_losses(network: FlexIPNetwork, forward: Forward, source: PairSource, cfg: TrainConfig) -> dict[str, Any]:
    """As Meter reports them. `cfg.validate` rows of each kind that there is, in parts as large as a step's."""
    meter = Meter(forward.timestep_weights.device)
    kinds = [kind for kind, there in ((INVARIANT, source.pictures()), (VARIANT, source.views())) if there]
    size = max(1, cfg.batch // cfg.accumulate)
    for kind in kinds:
        for begin in range(0, cfg.validate, size):
            rows = torch.full((min(size, cfg.validate - begin),), kind)
            number = 1_000_000 * kind + begin

            def draw(purpose: str, number: int = number) -> torch.Generator:
                return generator(SEED, number, 0, purpose)

            batch = source.batch(rows, draw("pairs"))
            gates = draw_gates(rows, cfg.gates, draw("gates"))
            losses, timesteps = forward.losses(network, batch, gates, draw, len(rows), ALL, NOTHING_DROPPED)
            meter.add(losses, rows.to(losses.device), timesteps, len(forward.timestep_weights))
    return meter.report()
