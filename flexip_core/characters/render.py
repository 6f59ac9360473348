"""Scenes as pictures: a character is composed from its layers, drawn in a style, put before a camera and onto a ground.

Shape legend: n pictures; RGBA is (n, 4, s, s) in 0..1 with the colours times alpha.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import styles
from .drawings import LEFT, TOP, UNITS, WINDOW, Drawings
from .scenes import Scenes
from .words import CLOTHES, GROUNDS, HAIR_COLOURS, PATTERNS, PLACES, SKINS, STYLES

SIZE = 64  # of a picture, in pixels
MIDDLE, HEAD_TOP = 356, 62  # of the bust, in units of the drawing
CLOSE, FAR, ASIDE = 640, 880, 170  # width of what the camera sees, and how far it looks past a figure that stands aside
PAPER, DARK = 0.98, 0.45  # of ink: what has no colour, and the brightness below which hair is black
STEP = 16  # pixels after which a pattern repeats


def render(drawings: Drawings, scenes: Scenes) -> Tensor:
    """n scenes -> pictures (n, 3, SIZE, SIZE) in -1..1, on the drawings' device"""
    scenes = scenes.to(drawings.device)
    figures = styled(compose(drawings, scenes), scenes["style"])
    figures = framed(figures, scenes)
    return over(figures, ground(scenes))[:, :3].clamp(0, 1) * 2 - 1


def compose(drawings: Drawings, scenes: Scenes) -> Tensor:
    """RGBA of the figures alone: head on body, face, beard, glasses."""
    skin = palette(SKINS, scenes["skin"], scenes.device)
    hair = palette(HAIR_COLOURS, scenes["hair colour"], scenes.device)
    clothes = palette(tuple(CLOTHES.values()), scenes["clothes"], scenes.device)
    uncoloured = (scenes["style"] == STYLES.index("ink")).unsqueeze(1)
    skin, clothes = skin.where(~uncoloured, PAPER), clothes.where(~uncoloured, PAPER)
    hair = hair.where(~uncoloured, torch.where(hair.mean(1, keepdim=True) < DARK, 0.1, PAPER))
    colours = torch.stack([skin, hair, clothes], 2)

    def layer(group: str, part: str) -> Tensor:
        planes = drawings.layers[group][scenes[part]].float() / 255
        planes[:, :3] += (colours @ planes[:, 4:].flatten(2)).unflatten(2, planes.shape[2:])
        return planes[:, :4]

    figure = layer("head", "hair")
    window = figure[(..., *WINDOW)]
    for group, part in (("face", "expression"), ("facialHair", "beard"), ("accessories", "glasses")):
        window = over(layer(group, part), window)
    figure[(..., *WINDOW)] = window
    return figure


def palette(hexes: tuple[str, ...], chosen: Tensor, device: torch.device) -> Tensor:
    """(n,) of numbers -> colours (n, 3) in 0..1"""
    table = torch.tensor([list(bytes.fromhex(value)) for value in hexes], device=device).float() / 255
    return table[chosen]


def over(top: Tensor, bottom: Tensor) -> Tensor:
    """RGBA over RGBA or over an opaque picture (n, 3, s, s)"""
    return top[:, : bottom.shape[1]] + bottom * (1 - top[:, 3:])


def styled(figures: Tensor, style: Tensor) -> Tensor:
    out = figures.clone()
    for number, name in enumerate(STYLES):
        rows = style == number
        if name in styles.RULES and rows.any():
            out[rows] = styles.RULES[name](figures[rows])
    return out


def framed(figures: Tensor, scenes: Scenes) -> Tensor:
    """What the camera sees of RGBA figures, at SIZE."""
    n, place, jitter = len(figures), scenes["place"], scenes.jitter
    width = torch.where(place == PLACES.index("close up"), CLOSE, FAR) * (0.95 + 0.1 * jitter[:, 0])
    aside = (place == PLACES.index("on the left")).float() - (place == PLACES.index("on the right")).float()
    x = MIDDLE + ASIDE * aside + 30 * (2 * jitter[:, 1] - 1)
    # more air above a head that is far away
    y = HEAD_TOP - 50 - 0.12 * (width - CLOSE) + width / 2 + 20 * (2 * jitter[:, 2] - 1)
    matrix = torch.zeros(n, 2, 3, device=figures.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = width / UNITS
    matrix[:, 0, 2] = 2 * (x - LEFT) / UNITS - 1
    matrix[:, 1, 2] = 2 * (y - TOP) / UNITS - 1
    # twice as fine, then averaged: lines keep their strength
    grid = F.affine_grid(matrix, [n, 4, 2 * SIZE, 2 * SIZE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(figures, grid, mode="bilinear", align_corners=False), 2)


def ground(scenes: Scenes) -> Tensor:
    """(n, 3, SIZE, SIZE) in 0..1"""
    colour = palette(tuple(GROUNDS.values()), scenes["ground"], scenes.device).view(-1, 3, 1, 1)
    light = colour.mean(1, keepdim=True)
    second = torch.where(light > 0.5, colour * 0.8, colour * 0.65 + 0.35)
    return colour + (second - colour) * pattern_masks(scenes.device)[scenes["pattern"]].unsqueeze(1)


def pattern_masks(device: torch.device) -> Tensor:
    """(patterns, SIZE, SIZE) of 0 and 1"""
    along = torch.arange(SIZE, device=device)
    y, x = torch.meshgrid(along, along, indexing="ij")
    masks = {
        "plain": torch.zeros_like(x),
        "stripes": (x + y) // (STEP // 2) % 2 == 0,
        "dots": (x % STEP - STEP / 2 + 0.5) ** 2 + (y % STEP - STEP / 2 + 0.5) ** 2 < 13,
        "checks": (x // (STEP // 2) + y // (STEP // 2)) % 2 == 0,
    }
    return torch.stack([masks[name].float() for name in PATTERNS])
