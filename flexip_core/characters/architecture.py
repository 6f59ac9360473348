"""The base's UNet in numbers, for diffusers and for ComfyUI. It predicts v, at 16 x 16 latents of 24 channels."""

from __future__ import annotations

from typing import Any

from .render import SIZE

TEXT_WIDTH = 128
PATCH = 4  # pixels of the picture, across one latent
CHANNELS = 24
GRID = SIZE // PATCH
HEADS = 4
# at least 64: both libraries normalise in 32 groups, and a channel that is a group of its own loses its mean
# fewer at 16 x 16 learn slower (measured at equal minutes); ComfyUI wants multiples of the first
WIDTHS = (128, 128, 128)
ATTENDS = (False, True, False)  # text is read at 8 x 8, and by the middle block at 4 x 4
UNET = {
    "sample_size": GRID,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "down_block_types": tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in ATTENDS),
    "up_block_types": tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(ATTENDS)),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": HEADS,  # in diffusers' class the number of heads, whatever it is called
    "norm_num_groups": 32,
}
COMFYUI_UNET: dict[str, Any] = {
    "image_size": GRID,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
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
