"""The base's UNet in numbers, for diffusers and for ComfyUI, and its latents: `pixel_unshuffle(2)` of the picture, lossless."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import world

TEXT_WIDTH = 64
LATENT_CHANNELS = 12
HEADS = 2
# at least 64: both libraries normalise in 32 groups, and a channel that is a group of its own loses its mean (measured: with 32
# channels the ground stays at chance)
WIDTHS = (64, 64)
ATTENDS = (False, True)  # text is read at 4 x 4 only, which halves the time of a step
UNET = {
    "sample_size": world.SIZE // 2,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "down_block_types": tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in ATTENDS),
    "up_block_types": tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(ATTENDS)),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": HEADS,  # in diffusers' class the number of heads, whatever it is called
    "norm_num_groups": 32,
}
COMFYUI_UNET: dict[str, Any] = {
    "image_size": world.SIZE // 2,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": WIDTHS[0],
    "channel_mult": [width // WIDTHS[0] for width in WIDTHS],
    "num_res_blocks": [1] * len(WIDTHS),
    "transformer_depth": [int(attends) for attends in ATTENDS],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [int(attends) for attends in ATTENDS for _ in range(2)],
    "context_dim": TEXT_WIDTH,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}


def to_latents(pictures: Tensor) -> Tensor:
    """(b, 3, 16, 16) in -1..1 -> (b, 12, 8, 8)"""
    return F.pixel_unshuffle(pictures, 2)


def to_pictures(latents: Tensor) -> Tensor:
    return F.pixel_shuffle(latents, 2).clamp(-1, 1)
