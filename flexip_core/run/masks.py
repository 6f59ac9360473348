"""Masks over the picture: from masks of any size (pictures/crop.as_masks) to one factor per image token of a UNet block.

Shape legend: m masks, b rows of a UNet call, H x W the whole latent, h x w what a call shows of it, gh x gw a block's grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def on_latent(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(m, any, any) -> (m, height, width): the mean over the pixels that a latent cell touches.

    So a cell is exactly 0 (or 1) where all of the mask over it is, even where the mask is smaller than the latent.
    """
    return F.interpolate(masks.unsqueeze(1), size=(height, width), mode="area").squeeze(1)


def for_rows(
    masks: torch.Tensor,
    items: Sequence[int],
    views: Sequence[tuple[tuple[int, ...], tuple[int, ...]] | None],
    height: int,
    width: int,
) -> torch.Tensor:
    """What each row of a call of height x width sees of its own mask of the whole latent, masks (m, H, W) -> (b, height, width).

    `items` are rows of the latent batch; masks repeat where there are fewer. `views` are the latent's rows and columns that the
    call shows (None: all of it, or an unknown part: then the mask is laid over what it shows).
    """
    shown: dict[tuple, torch.Tensor] = {}
    keys = [(item % len(masks), view) for item, view in zip(items, views)]
    for index, view in dict.fromkeys(keys):
        mask = masks[index]
        if view is not None:
            rows, columns = view
            mask = mask[list(rows)][:, list(columns)]
        shown[index, view] = on_latent(mask.unsqueeze(0), height, width)
    return torch.cat([shown[key] for key in keys])


def on_grid(maps: torch.Tensor, level: int) -> torch.Tensor:
    """(b, h, w) -> (b, gh, gw) of a block that runs where the latent was halved `level` times.

    The UNet halves by a convolution with stride 2 and padding 1, so that a token of level l stands over 2^l x 2^l latent cells
    counted from the top left, and the last row and column over what is left: sizes divide rounding up.
    """
    side = 2**level
    return F.avg_pool2d(maps.unsqueeze(1), side, ceil_mode=True).squeeze(1) if level else maps
