"""What the tests beside the packs with Attention Couple share: two regions of an 8 x 8 latent, and what every row is to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from flexip_pack.nodes import runtime

from . import layouts

SIDE = 64  # of the masks in pixels
TEXTS = tiny.cond(5), tiny.cond(6)


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """(1, h, w): left and right half."""
    left = (torch.arange(SIDE) < SIDE // 2).float().expand(1, SIDE, SIDE).contiguous()
    return left, 1 - left


def check(model: Any, put: Callable[[Any], Any], what: str) -> None:
    """`put` adds their node. Every latent of a batch, in either order of the nodes and with guidance or not, must become what it
    becomes alone and with positive and negative evaluated one after the other, where a call has one row that all came from."""
    network, reference = tiny.tiny_network(model), tiny.tiny_reference()
    for batch, cfg in ((1, 7.0), (2, 7.0), (3, 7.0), (2, 1.0)):
        gates = tuple((index + 1) / (batch + 1) for index in range(batch))
        regions = torch.rand(batch, 8, 8, generator=tiny.generator(3))
        link, noise = tiny.link_for(network, reference, gates, mask=regions), tiny.noise_for(batch)
        alone = []
        for index in range(batch):
            own = tiny.link_for(network, reference, gates[index], mask=regions[index : index + 1])
            coupled, part = put(runtime.attach(model, own)), noise[index : index + 1]
            coupled.model.memory_required = lambda shape, **more: 1e18  # as on a full card
            try:
                alone.append(sample(coupled, part, cfg))
            finally:
                del coupled.model.memory_required
        expected = torch.cat(alone)
        for order, coupled in (
            ("FlexIP, then theirs", put(runtime.attach(model, link))),
            ("theirs, then FlexIP", runtime.attach(put(model), link)),
        ):
            got = sample(coupled, noise, cfg)
            assert layouts.error(got, expected, f"{what}, batch {batch}, CFG {cfg:g}, {order}") < 1e-5
        assert layouts.error(expected, sample(put(model), noise, cfg), "theirs alone") > 1e-3


def sample(model: Any, noise: torch.Tensor, cfg: float) -> torch.Tensor:
    return tiny.ksample(model, tiny.cond(1), tiny.cond(2), noise=noise, cfg=cfg)
