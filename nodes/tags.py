"""What travels with every conditioning through a run: which rows of a UNet call are whose, and which part of the latent they show."""

from __future__ import annotations

from typing import Any

import comfy.conds
import torch

from ..flexip_core.link import Row, View

TAG = "flexip_tag"
VIEW = "flexip_view"
ROWS = 2**20  # more than any batch has


def tag(entry: int, batch: int) -> comfy.conds.CONDRegular:
    """(batch, 1, 1): which conditioning of the run a row belongs to, and its row in the latent batch, as one number.

    A tensor with a row per latent, so that whatever repeats, cuts, windows or reorders the batch does the same to it. It stays on
    the CPU, so that reading it back waits for nothing.
    """
    return comfy.conds.CONDRegular((entry * ROWS + torch.arange(batch)).view(-1, 1, 1))


def view(height: int, width: int) -> comfy.conds.CONDNoiseShape:
    """(1, 2, height, width): row and column of every latent cell.

    Has the latent's own size, so that whatever cuts the latent (areas, context windows over height or width, tiles) cuts it alike.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return comfy.conds.CONDNoiseShape(torch.stack([rows, columns]).unsqueeze(0))


def read(
    tags: torch.Tensor, views: torch.Tensor | None, count: int, height: int, width: int, options: dict[str, Any]
) -> tuple[Row, ...]:
    """The rows of a UNet call of `count` rows of height x width. Core cuts or repeats per-row conditionings without a word."""
    numbers = tags.flatten().tolist()
    if len(numbers) != count:
        raise RuntimeError(
            f"FlexIP: a model call of {count} rows came with tags for {len(numbers)}; another node resized the batch without its conditionings."
        )
    seen = _views(views, count, height, width) if views is not None else [None] * count
    if views is not None and seen[0] is None:
        seen = published(options, count)
    return tuple(Row(*divmod(int(number), ROWS), part) for number, part in zip(numbers, seen))


def _views(views: torch.Tensor, count: int, height: int, width: int) -> list[View | None]:
    """Which rows and columns of the latent each row shows; None where the map was not cut along with the latent."""
    if views.shape[0] != count or views.shape[-2:] != (height, width):
        return [None] * count
    rows, columns = views[:, 0, :, 0].tolist(), views[:, 1, 0, :].tolist()
    return [(tuple(map(int, r)), tuple(map(int, c))) for r, c in zip(rows, columns)]


def published(options: dict[str, Any], count: int) -> list[View | None]:
    """The parts that a tiling pack notes in transformer_options, tile after tile; toyxyz' TiledDiffusion does, in latent cells."""
    boxes = options.get("tiled_diffusion_bboxes")
    if not boxes or count % len(boxes):
        return [None] * count
    return [
        (tuple(range(box.y, box.y + box.h)), tuple(range(box.x, box.x + box.w)))
        for box in boxes
        for _ in range(count // len(boxes))
    ]
