"""Pictures side by side with a label each."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MARGIN = 4
WIDEST = 8192  # pixels; more columns go on in the next band
INK, PAPER = (20, 20, 20), (255, 255, 255)


def contact_sheet(pictures: torch.Tensor, labels: list[str]) -> torch.Tensor:
    """pictures (len(labels) * rows, h, w, 3) in 0..1, label-major -> one sheet (1, H, W, 3), a column per label."""
    count, height, width, _ = pictures.shape
    rows = count // len(labels)
    columns = min(len(labels), max(1, WIDEST // (width + MARGIN)))
    bands = -(-len(labels) // columns)
    font = ImageFont.load_default(size=max(10, min(28, width // 8)))
    header = int(font.size * 1.6)
    band_height = header + rows * (height + MARGIN)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, bands * band_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    pixels = (pictures.clamp(0, 1).cpu() * 255).round().to(torch.uint8).numpy()
    for number, label in enumerate(labels):
        left, top = MARGIN + number % columns * (width + MARGIN), number // columns * band_height
        draw.text((left + width / 2, top + header / 2), label, fill=INK, font=font, anchor="mm")
        for row in range(rows):
            sheet.paste(Image.fromarray(pixels[number * rows + row]), (left, top + header + row * (height + MARGIN)))
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255).unsqueeze(0)
