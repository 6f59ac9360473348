"""Pictures side by side with a label each."""
from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MARGIN = 4
INK, PAPER = (20, 20, 20), (255, 255, 255)


def contact_sheet(pictures: torch.Tensor, labels: list[str]) -> torch.Tensor:
    """pictures (len(labels) * rows, h, w, 3) in 0..1, label-major -> one sheet (1, H, W, 3), a column per label."""
    count, height, width, _ = pictures.shape
    rows = count // len(labels)
    font = ImageFont.load_default(size=max(10, min(28, width // 8)))
    header = int(font.size * 1.6)
    sheet = Image.new("RGB", (len(labels) * (width + MARGIN) + MARGIN, header + rows * (height + MARGIN)), PAPER)
    draw = ImageDraw.Draw(sheet)
    pixels = (pictures.clamp(0, 1).cpu() * 255).round().to(torch.uint8).numpy()
    for column, label in enumerate(labels):
        left = MARGIN + column * (width + MARGIN)
        draw.text((left + width / 2, header / 2), label, fill=INK, font=font, anchor="mm")
        for row in range(rows):
            sheet.paste(Image.fromarray(pixels[column * rows + row]), (left, header + row * (height + MARGIN)))
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255).unsqueeze(0)
