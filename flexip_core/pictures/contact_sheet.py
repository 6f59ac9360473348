"""Pictures side by side with a label each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MARGIN = 4
WIDEST = 8192  # pixels; more columns go on in the next band
SMALLEST = 192  # pixels: smaller pictures are shown enlarged, so that they and their labels can be read
INK, PAPER = (20, 20, 20), (255, 255, 255)


def contact_sheet(pictures: torch.Tensor, labels: Sequence[str], row_labels: Sequence[str] = ()) -> torch.Tensor:
    """pictures (len(labels) * rows, h, w, 3) in 0..1, label-major -> one sheet (1, H, W, 3), a column per label.

    `row_labels` stand on the left, each before an equal share of the rows. Small pictures are enlarged a whole number of times.
    """
    times = max(1, SMALLEST // pictures.shape[2])
    pictures = pictures.repeat_interleave(times, 1).repeat_interleave(times, 2)
    count, height, width, _ = pictures.shape
    rows = count // len(labels)
    font = ImageFont.load_default(size=max(10, min(28, width // 8)))
    left = max((int(font.getlength(text)) + 2 * MARGIN for text in row_labels), default=0)
    columns = min(len(labels), max(1, (WIDEST - left) // (width + MARGIN)))
    bands = -(-len(labels) // columns)
    header = int(font.size * 1.6)
    band_height = header + rows * (height + MARGIN)
    sheet = Image.new("RGB", (left + columns * (width + MARGIN) + MARGIN, bands * band_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    pixels = (pictures.clamp(0, 1).cpu() * 255).round().to(torch.uint8).numpy()
    for number, label in enumerate(labels):
        x, top = left + MARGIN + number % columns * (width + MARGIN), number // columns * band_height
        draw.text((x + width / 2, top + header / 2), label, fill=INK, font=font, anchor="mm")
        for row in range(rows):
            sheet.paste(Image.fromarray(pixels[number * rows + row]), (x, top + header + row * (height + MARGIN)))
    for band in range(bands):
        for number, label in enumerate(row_labels):
            middle = band * band_height + header + (number + 0.5) * (rows // len(row_labels)) * (height + MARGIN)
            draw.text((left - MARGIN, middle), label, fill=INK, font=font, anchor="rm")
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255).unsqueeze(0)
