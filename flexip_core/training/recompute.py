"""Less memory for more time: the UNet keeps only what enters each ResBlock and each transformer, and computes the rest again for the
gradient. (Others call it gradient checkpointing; a checkpoint is a file here.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

BLOCKS = ("ResnetBlock2D", "Transformer2DModel")


def set_recompute(unet: nn.Module, on: bool) -> None:
    """Turns it on or off for diffusers' UNet2DConditionModel, in train and in eval mode.

    Not diffusers' own enable_gradient_checkpointing: in a transformer it keeps the norms and projections around the blocks, and its
    second pass would run after `gated` is over, that is, without the adapters.
    """
    for block in unet.modules():
        if type(block).__name__ in BLOCKS:
            block.__dict__.pop("forward", None)
            if on:
                block.forward = partial(_forward, block)


def _forward(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    compute = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return compute(*inputs, **named)
    processors = {part: part.processor for part in block.modules() if hasattr(part, "processor")}
    contexts = partial(_contexts, processors)
    # the frozen UNet is in eval mode and draws nothing, so there is no random state to bring back
    return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **named)


def _contexts(processors: dict[nn.Module, Any]) -> tuple[contextlib.AbstractContextManager, ...]:
    """For the first pass and for the second, which must see the attention processors of the first."""
    return contextlib.nullcontext(), _with(processors)


@contextlib.contextmanager
def _with(processors: dict[nn.Module, Any]) -> Iterator[None]:
    now = {part: part.processor for part in processors}
    try:
        for part, processor in processors.items():
            part.processor = processor
        yield
    finally:
        for part, processor in now.items():
            part.processor = processor
