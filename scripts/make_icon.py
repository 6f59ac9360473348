"""Draws docs/icon.png and docs/banner.png, which the registry shows: a subject of two colours that the slider lets go of.

python scripts/make_icon.py       (with ComfyUI's own Python: it needs Pillow)
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parents[1] / "docs"
FINER = 4  # drawn this much larger, then made smaller: smooth edges
GROUND, TRACK, WHITE = (24, 27, 38), (58, 64, 84), (244, 245, 250)
KEPT, FREE = ((255, 138, 76), (108, 92, 231)), ((86, 204, 178), (64, 132, 214))  # upper and lower half of the subject

Colour = tuple[int, int, int]


def between(free: Colour, kept: Colour, gate: float) -> Colour:
    red, green, blue = (round(gate * k + (1 - gate) * f) for f, k in zip(free, kept))
    return red, green, blue


def subject(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, gate: float) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    draw.pieslice(box, 180, 360, fill=between(FREE[0], KEPT[0], gate))
    draw.pieslice(box, 0, 180, fill=between(FREE[1], KEPT[1], gate))


def slider(draw: ImageDraw.ImageDraw, left: float, right: float, y: float, thick: float, gate: float) -> None:
    knob = left + gate * (right - left)
    draw.rounded_rectangle((left, y - thick / 2, right, y + thick / 2), thick / 2, fill=TRACK)
    draw.rounded_rectangle((left, y - thick / 2, knob, y + thick / 2), thick / 2, fill=KEPT[0])
    draw.circle((knob, y), 1.6 * thick, fill=WHITE)


def icon() -> Image.Image:
    size = 400 * FINER
    image = Image.new("RGB", (size, size), GROUND)
    draw = ImageDraw.Draw(image)
    subject(draw, 0.5 * size, 0.40 * size, 0.24 * size, 1)
    slider(draw, 0.18 * size, 0.82 * size, 0.79 * size, 0.045 * size, 0.7)
    return image.resize((400, 400), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    width, height = 1260 * FINER, 540 * FINER  # 21 : 9
    image = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(image)
    draw.text((width / 2, 0.20 * height), "FlexIP", WHITE, ImageFont.load_default(96 * FINER), anchor="mm")
    left, right = 0.14 * width, 0.86 * width
    for step in range(5):
        subject(draw, left + step / 4 * (right - left), 0.51 * height, 0.115 * height, step / 4)
    slider(draw, left, right, 0.75 * height, 0.02 * height, 0.75)
    words = ImageFont.load_default(34 * FINER)
    draw.text((left - 0.05 * width, 0.87 * height), "follow my prompt", WHITE, words, anchor="lm")
    draw.text((right + 0.05 * width, 0.87 * height), "keep this subject", WHITE, words, anchor="rm")
    return image.resize((1260, 540), Image.Resampling.LANCZOS)


def main() -> int:
    icon().save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.png", optimize=True)
    print(f"{DOCS / 'icon.png'} and banner.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
