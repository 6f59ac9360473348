"""What travels with every conditioning through a run: whose each row of a UNet call is, and which part of the latent it shows."""

from __future__ import annotations

from typing import Any

import comfy.conds
import torch

from ..flexip_core.run.chain import Row, View

TAG = "flexip_tag"
VIEW = "flexip_view"
ROWS = 2**20  # more than any batch has


def tag(entry: int, batch: int) -> comfy.conds.CONDRegular:
    """(batch, 1, 1): which conditioning of the run a row belongs to, and its row in the latent batch, as one number.

    A tensor with a row per latent, so that whatever repeats, cuts, windows or reorders the batch does the same to it. It stays on
    the CPU, so that reading it back does not wait for the GPU.
    """
    return comfy.conds.CONDRegular((entry * ROWS + torch.arange(batch)).view(-1, 1, 1))


def view(height: int, width: int) -> comfy.conds.CONDNoiseShape:
    """(1, 2, height, width, 1): row and column of every latent cell.

        Laid out like the latent, so that whatever cuts the latent (areas, context windows over height or width) cuts it alike. The last
    The last
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return comfy.conds.CONDNoiseShape(torch.stack([rows, columns])[None, ..., None])


def read(
    tags: torch.Tensor, views: torch.Tensor | None, count: int, height: int, width: int, options: dict[str, Any]
) -> tuple[Row, ...]:
    """The rows of a UNet call of `count` rows of height x width. Core cuts or repeats per-row conditionings without a word."""
    numbers = tags.flatten().tolist()
    if len(numbers) != count:
        raise RuntimeError(
            f"FlexIP: a model call of {count} rows came with tags for {len(numbers)}; another node resized the batch without its conditionings."
        )
    seen: list[View | None] = [None] * count
    if views is not None and len(views) == count:
        shown = [_whole(row) for row in views]
        if tuple(map(len, shown[0])) != (height, width):  # not cut along with the latent
            shown = _of_tiles(options, shown)
        seen = [part if tuple(map(len, part)) == (height, width) else None for part in shown]
    return tuple(Row(*divmod(int(number), ROWS), part) for number, part in zip(numbers, seen))


def _whole(view: torch.Tensor) -> View:
    return tuple(view[0, :, 0, 0].tolist()), tuple(view[1, 0, :, 0].tolist())


def _of_tiles(options: dict[str, Any], views: list[View]) -> list[View]:
    """The parts of `views` that a tiling pack shows, if it notes them: toyxyz' TiledDiffusion does, tile after tile, in latent cells.

    Boxes count within what the pack was given, after it was rolled by the shift (SpotDiffusion rolls one axis where both are named).
    """
    boxes = options.get("tiled_diffusion_bboxes")
    if not boxes or len(views) % len(boxes):
        return views
    down, right = options.get("tiled_diffusion_shift") or (0, 0)
    if down and right:
        down, right = (down, 0) if options.get("tiled_diffusion_shift_condition") else (0, right)
    out = []
    for number, (rows, columns) in enumerate(views):
        box = boxes[number // (len(views) // len(boxes))]
        out.append((_rolled(rows, down)[box.y : box.y + box.h], _rolled(columns, right)[box.x : box.x + box.w]))
    return out


def _rolled(indices: tuple[int, ...], shift: int) -> tuple[int, ...]:
    """As torch.roll does."""
    shift %= len(indices)
    return indices[-shift:] + indices[:-shift] if shift else indices
