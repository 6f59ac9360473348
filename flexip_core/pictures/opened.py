"""Opening picture files that anybody may have made: what is too large is refused by its header, before a pixel is decoded."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from PIL import Image

MOST_PIXELS = 64_000_000  # of one picture, 8000 x 8000; decoded, with transparency, it takes about a gigabyte
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # PIL counts MPO, a phone's JPEG with two pictures, as JPEG
"""Nothing else is tried: PIL would hand PostScript to another program."""
LARGEST_TILE = (
    2**22
)  # pixels of a TIFF's tile, which usually has 2**16; it is decoded whole, however small the picture is
_TILE = (322, 323)  # TIFF 6.0, section 15: TileWidth, TileLength
_WHOLE = {
    1: "B",
    3: "H",
    4: "I",
    16: "Q",
    6: "B",
    8: "H",
    9: "I",
    17: "Q",
}  # types of whole numbers, those with a sign last


class TooLarge(ValueError):
    """Half a sentence."""


def open_picture(file: BinaryIO | str | Path) -> Image.Image:
    """Not decoded yet. TooLarge for more than MOST_PIXELS; PIL's exceptions for what is not a picture."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(_too_large("far more pixels")) from None
    try:
        refuse_large(*image.size)
        if image.format == "TIFF":
            _refuse_large_tiles(image)
    except TooLarge:
        if isinstance(file, (str, Path)):  # an open file is its owner's to close
            image.close()
        raise
    return image


def refuse_large(width: int, height: int) -> None:
    """TooLarge for more than MOST_PIXELS."""
    if width * height > MOST_PIXELS:
        raise TooLarge(_too_large(f"{width} x {height} pixels"))


def _refuse_large_tiles(image: Image.Image) -> None:
    """TooLarge for tiles of more than LARGEST_TILE pixels. Of equal entries older PIL tells the last, the decoder takes the first."""
    file, place = image.fp, image.fp.tell()
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    large = 43 in head[2:4]  # BigTIFF
    file.seek(struct.unpack(f"{order}8xQ" if large else f"{order}4xI8x", head)[0])
    (count,) = struct.unpack(f"{order}Q" if large else f"{order}H", file.read(8 if large else 2))
    sides = dict.fromkeys(_TILE, 0)
    length, value = (20, 12) if large else (12, 8)
    for _ in range(count):
        entry = file.read(length)
        if len(entry) < length:
            break
        tag, kind = struct.unpack_from(f"{order}HH", entry)
        if tag in sides and kind in _WHOLE:
            sides[tag] = max(sides[tag], *struct.unpack_from(order + _WHOLE[kind], entry, value))
    file.seek(place)
    width, height = sides.values()
    if width * height > LARGEST_TILE:
        raise TooLarge(_too_large(f"tiles of {width} x {height} pixels", LARGEST_TILE))


def _too_large(what: str, most: int = MOST_PIXELS) -> str:
    return f"it has {what}, and {most // 10**6} megapixels are the most that is read: save it smaller"
