"""Opening picture files that anybody may have made: what is too large is refused by its header, before a pixel is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image

MOST_PIXELS = 64_000_000  # of one picture, 8000 x 8000; decoded, with transparency, it takes about a gigabyte
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # PIL counts MPO, a phone's JPEG with two pictures, as JPEG
"""Nothing else is tried: PIL would hand PostScript to another program."""


class TooLarge(ValueError):
    """Half a sentence."""


def open_picture(file: BinaryIO | str | Path) -> Image.Image:
    """Not decoded yet. TooLarge for more than MOST_PIXELS; PIL's exceptions for what is no picture."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(_too_large("far more pixels")) from None
    try:
        refuse_large(*image.size)
    except TooLarge:
        if isinstance(file, (str, Path)):  # an open file is its owner's to close
            image.close()
        raise
    return image


def refuse_large(width: int, height: int) -> None:
    """TooLarge for more than MOST_PIXELS."""
    if width * height > MOST_PIXELS:
        raise TooLarge(_too_large(f"{width} x {height} pixels"))


def _too_large(what: str) -> str:
    return f"it has {what}, and {MOST_PIXELS // 10**6} megapixels are the most that is read: save it smaller"
