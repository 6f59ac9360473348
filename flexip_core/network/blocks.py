"""Finds the text cross-attentions of a UNet in ComfyUI's layout (input_blocks, middle_block, output_blocks)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn


def cross_attentions(diffusion_model: nn.Module) -> dict[str, Any]:
    """Block address -> attn2 module, in the order of execution.

    The address is ComfyUI's own: block kind, block number, transformer index; the middle block is number 0. A model without
    such blocks (Flux, SD3, ...) gives an empty dict.
    """
    return {
        f"{kind}.{number}.{index}": transformer.attn2
        for kind, number, block in _blocks(diffusion_model)
        for layer in block
        for index, transformer in enumerate(getattr(layer, "transformer_blocks", ()))
        if getattr(transformer, "attn2", None) is not None
    }


def block_of(address: str) -> tuple[str, int, int]:
    """Kind, block number and transformer index of an address: "input.4.1" -> ("input", 4, 1)."""
    kind, number, index = address.split(".")
    return kind, int(number), int(index)


def _blocks(diffusion_model: Any) -> Iterator[tuple[str, int, Any]]:
    for number, block in enumerate(getattr(diffusion_model, "input_blocks", ())):
        yield "input", number, block
    if getattr(diffusion_model, "middle_block", None) is not None:
        yield "middle", 0, diffusion_model.middle_block
    for number, block in enumerate(getattr(diffusion_model, "output_blocks", ())):
        yield "output", number, block


def block_widths(diffusion_model: nn.Module) -> tuple[dict[str, int], int | None]:
    """Inner width per block address, and the width of the text tokens that the blocks read (None without blocks)."""
    found = cross_attentions(diffusion_model)
    text_width = next((attn.to_k.weight.shape[1] for attn in found.values()), None)
    return {address: attn.to_q.weight.shape[0] for address, attn in found.items()}, text_width


def block_levels(diffusion_model: nn.Module) -> dict[str, int]:
    """How often the latent was halved where each block of cross_attentions runs, same addresses in the same order.

    A block at level n works on ceil(height / 2**n) x ceil(width / 2**n) tokens: ComfyUI halves by a convolution with stride 2
    and padding 1, and doubles to the size of the skip connection.
    """
    levels: dict[str, int] = {}
    level = 0
    for kind, number, block in _blocks(diffusion_model):
        for layer in block:
            resampler = getattr(layer, "h_upd", layer)  # of a ResBlock with up or down; an Identity in any other
            level += {"Downsample": 1, "Upsample": -1}.get(type(resampler).__name__, 0)
            for index in range(len(getattr(layer, "transformer_blocks", ()))):
                levels[f"{kind}.{number}.{index}"] = level
    return {address: levels[address] for address in cross_attentions(diffusion_model)}


def text_projections(diffusion_model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The UNet's own text to_k and to_v weights per block address, to start an adapter from."""
    return {
        address: (attn.to_k.weight, attn.to_v.weight) for address, attn in cross_attentions(diffusion_model).items()
    }
