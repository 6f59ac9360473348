"""Open Peeps as layers: every drawing of the package rasterised once, its colours taken apart.

resvg blends colours linearly, so a drawing with free colours is a sum: what is there whatever the colours are, and for skin, hair
and clothes a mask that is multiplied by the colour. One character costs a few multiplications instead of an SVG, and the millions
of them fit into one file of a few hundred kilobytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files.weights import write_atomically
from .words import BEARDS, EXPRESSIONS, GLASSES, HAIR, NONE

PACKAGE = "@dicebear/open-peeps"
VERSION = "9.4.3"
SIDE = 128  # pixels of a layer
FINE = 5  # times finer is what colours are taken apart at
# Most of the package's hair is black whatever its colour. Where black is wider than a line it becomes hair-coloured, but for an
# outline. In pixels of the finer drawing; a line is about 9 of them wide.
LINE, OUTLINE = 7, 5
# Units of the package's drawing: the bust and, below the part that the package shows, more of the body.
LEFT, TOP, UNITS = -128, -40, 960
COLOURS = ("skin", "headContrast", "clothing")  # as the package calls them
LAYERS: dict[str, tuple[str, ...]] = {  # group of the package -> its drawings, in our order
    "head": HAIR,
    "face": tuple(EXPRESSIONS),
    "facialHair": BEARDS,
    "accessories": GLASSES,
}
HAIRY = ("head", "facialHair")
WINDOW = slice(36, 92), slice(24, SIDE)  # rows and columns in which all of a face, a beard or glasses lies
PLANES = 4 + len(COLOURS)  # red, green, blue times alpha; alpha; a mask for each free colour


@dataclass(frozen=True)
class Drawings:
    """Group -> layers (drawings, PLANES, h, w), uint8: SIDE x SIDE for heads, each with its body, else the WINDOW of that."""

    layers: Mapping[str, Tensor]

    def to(self, device: str | torch.device) -> Drawings:
        return Drawings({group: layer.to(device) for group, layer in self.layers.items()})

    @property
    def device(self) -> torch.device:
        return self.layers["head"].device


def make(package: Path) -> Drawings:
    """From the unpacked npm package `@dicebear/open-peeps`. ValueError if it is not laid out as version 9.4.3 is."""
    source = _read(package / "lib" / "index.js")
    body = re.search(r"body: `(<g fill-rule.*?</g>)<g transform", source, re.DOTALL)
    if body is None:
        raise ValueError(f"{package} is not {PACKAGE} {VERSION}: its index.js draws no body.")
    layers = {}
    for group, names in LAYERS.items():
        place = re.search(rf'<g transform="([^"]+)">\$\{{[^}}]*?components\.{group}\)', source)
        script = _read(package / "lib" / "components" / f"{group}.js")
        drawn = dict(re.findall(r"(\w+): \(components, colors\) => `([^`]*)`", script))
        missing = set(names) - set(drawn) - {NONE}
        if place is None or missing:
            raise ValueError(f"{package} is not {PACKAGE} {VERSION}: it has no {', '.join(sorted(missing)) or group}.")
        below = body[1] if group == "head" else ""
        pictures = [
            _layer(f'{below}<g transform="{place[1]}">{drawn[name]}</g>', group in HAIRY)
            if name != NONE
            else torch.zeros(PLANES, SIDE, SIDE)
            for name in names
        ]
        layers[group] = torch.stack(pictures).round().byte()
        if group != "head":
            layers[group] = layers[group][(..., *WINDOW)].clone()
    return Drawings(layers)


def save(drawings: Drawings, path: Path) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **{group: layer.numpy() for group, layer in drawings.layers.items()})
    write_atomically(path, file.getvalue())


def load(path: Path) -> Drawings:
    """ValueError if there is no such file, or if it holds other drawings than this version of the world wants."""
    if not path.is_file():
        raise ValueError(f"There is no {path} yet; make it with scripts/characters.py drawings.")
    with np.load(path, allow_pickle=False) as file:
        layers = {group: torch.from_numpy(file[group]) for group in LAYERS if group in file}
    for group, names in LAYERS.items():
        side = (SIDE, SIDE) if group == "head" else tuple(part.stop - part.start for part in WINDOW)
        wanted = (len(names), PLANES, *side)
        if group not in layers or tuple(layers[group].shape) != wanted:
            raise ValueError(f"{path} holds no {group} of shape {wanted}; make the drawings again.")
    return Drawings(layers)


def _read(path: Path) -> str:
    """A script of the package, its colours as "{skin}" and so on."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; unpack {PACKAGE} {VERSION} from npm there.")
    return re.sub(r"\$\{escape\.xml\(`\$\{colors\.(\w+)\}`\)\}", r"{\1}", path.read_text(encoding="utf-8"))


def _layer(svg: str, hairy: bool) -> Tensor:
    """(PLANES, SIDE, SIDE) in 0..255"""
    black = _raster(svg, {colour: "#000" for colour in COLOURS})
    masks = {}
    for free in COLOURS:
        white = _raster(svg, {colour: "#fff" if colour == free else "#000" for colour in COLOURS})
        masks[free] = (white - black)[:1].clamp(min=0)
    if hairy:
        always_black = black[3:] - black[:3].amax(0, keepdim=True) - sum(masks.values())
        masks["headContrast"] += _inside_of_wide(always_black)
    return F.avg_pool2d(torch.cat([black, *masks.values()]), FINE)


def _inside_of_wide(area: Tensor) -> Tensor:
    """Where `area` (1, h, w) is wider than a line, all of it but an outline."""
    rest = -_grown(-area, LINE)
    return torch.minimum(_grown(rest, LINE - OUTLINE), area)


def _grown(area: Tensor, radius: int) -> Tensor:
    return F.max_pool2d(area, 2 * radius + 1, 1, radius)


def _raster(svg: str, colours: Mapping[str, str]) -> Tensor:
    """(4, FINE * SIDE, FINE * SIDE) in 0..255, the colours times alpha"""
    import resvg_py  # only for making the drawings
    from PIL import Image

    for name, value in colours.items():
        svg = svg.replace(f"{{{name}}}", value)
    whole = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{LEFT} {TOP} {UNITS} {UNITS}" fill="none">{svg}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=whole, width=FINE * SIDE, height=FINE * SIDE)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))).movedim(-1, 0).float()
    return torch.cat([pixels[:3] * pixels[3:] / 255, pixels[3:]])
