"""The rule styles: RGBA figures (n, 4, s, s) in 0..1, colours times alpha, redrawn. No artist drew them.

Ink needs no rule: it is a figure composed without colours. A pencil sketch keeps pale ones, pixel art and stickers keep all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.3, 0.59, 0.11)  # how bright red, green and blue look
PIXEL = 3  # of pixel art, in pixels of a layer: one or two of the picture's


def _on_white(figures: Tensor) -> Tensor:
    return figures[:, :3] + 1 - figures[:, 3:]


def _grey(pictures: Tensor) -> Tensor:
    return sum(weight * pictures[:, k : k + 1] for k, weight in enumerate(GREY))


def _edges(figures: Tensor) -> Tensor:
    """(n, 1, s, s): how fast brightness or alpha change"""
    planes = torch.cat([_grey(_on_white(figures)), figures[:, 3:]], 1)
    planes = F.avg_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, 1)
    dx = F.pad(planes[..., 2:] - planes[..., :-2], (1, 1, 0, 0))
    dy = F.pad(planes[..., 2:, :] - planes[..., :-2, :], (0, 0, 1, 1))
    return (dx.square() + dy.square()).amax(1, keepdim=True).sqrt()


def _shape(figures: Tensor, rgb: Tensor, alpha: Tensor) -> Tensor:
    return torch.cat([rgb.expand(-1, 3, -1, -1) * alpha, alpha], 1)


def sketch(figures: Tensor) -> Tensor:
    """Grey lines, pale colours, shades hatched."""
    s = figures.shape[-1]
    along = torch.arange(s, device=figures.device)
    hatch = ((along[:, None] + along) % 6 < 2).float()
    white = _on_white(figures)
    shade = ((0.75 - _grey(white)) * 4).clamp(0, 1) * hatch * 0.55
    line = ((_edges(figures) - 0.08) * 6).clamp(0, 1) * 0.75
    dark = torch.maximum(shade, line)
    paper = torch.tensor([0.97, 0.95, 0.9], device=figures.device).view(1, 3, 1, 1)
    light = white.amax(1, keepdim=True).clamp(min=0.05)
    pale = paper * (0.45 + 0.55 * white / light)  # the hue without its darkness
    return _shape(figures, pale * (1 - dark) + 0.3 * dark, figures[:, 3:])


def pixel_art(figures: Tensor) -> Tensor:
    """Pixels that can be counted, hard borders."""
    s = figures.shape[-1]
    low = F.avg_pool2d(figures, PIXEL, ceil_mode=True, count_include_pad=False)
    alpha = (low[:, 3:] > 0.5).float()
    low = _shape(figures, low[:, :3] / low[:, 3:].clamp(min=0.05), alpha)
    return low.repeat_interleave(PIXEL, 2).repeat_interleave(PIXEL, 3)[..., :s, :s]


def sticker(figures: Tensor) -> Tensor:
    """A white rim and a soft shadow."""
    rim = F.avg_pool2d(F.max_pool2d(figures[:, 3:], 11, 1, 5), 3, 1, 1)
    shadow = F.pad(F.avg_pool2d(rim, 7, 1, 3), (4, -4, 4, -4)) * 0.5
    body = figures + _shape(figures, torch.ones_like(rim), rim) * (1 - figures[:, 3:])
    return body + _shape(figures, torch.zeros_like(shadow), shadow) * (1 - body[:, 3:])


RULES = {"pencil sketch": sketch, "pixel art": pixel_art, "sticker": sticker}
