"""A sheet of training pairs to look at."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from .choice import Choice
from .data import INVARIANT, KINDS, VARIANT
from .folders import FolderPairs
from .pictures import CUT_DRAWS, draw_cut

TRIES = 8  # for a cut that shows something
Pair = tuple[int, list[float]]  # the kind, and the draws that FolderPairs makes a row of


def contact_sheet_of_pairs(source: FolderPairs, n: int, seed: int) -> Image.Image:
    """`n` pairs as training makes them, kinds in turn: the reference, beside it the target, below them kind and caption."""
    pairs = choose_pairs(source, n, seed)
    side, margin, columns = 192, 6, max(1, min(3, n))
    font = ImageFont.load_default(size=13)
    cell_width, cell_height = 2 * side + 3 * margin, side + 3 * 16 + 2 * margin
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (kind, draws) in enumerate(pairs):
        target, reference, caption, *_ = source.row(kind, draws)
        x, y = i % columns * cell_width + margin, i // columns * cell_height + margin
        for j, pixels in enumerate((reference, target)):
            array = pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(array).resize((side, side)), (x + j * (side + margin), y))
        lines = _wrap(f"{KINDS[kind]}: {', '.join(caption) or '(no caption)'}", font, 2 * side, 3)
        draw.multiline_text((x, y + side + 2), "\n".join(lines), fill=(20, 20, 20), font=font, spacing=2)
    return sheet


def choose_pairs(source: FolderPairs, n: int, seed: int) -> list[Pair]:
    """No subject and no loose picture is shown again before all have been shown, however often training draws it.

    Many invariant references are their whole target: where others can be drawn, one of those is shown, or both halves are alike.
    """
    g = torch.Generator().manual_seed(seed)
    choice, shown, pairs = source.choice, Counter(), []
    places = {kind: _places(choice, kind) for kind in (INVARIANT, VARIANT)}
    kinds = [kind for kind, found in places.items() if found]
    if not kinds:
        raise ValueError("Training data: all weights are 0, so there is no pair to show; raise one in dataset.toml.")
    for i in range(n):
        kind = kinds[i % len(kinds)]
        draws = torch.rand(3 + CUT_DRAWS + 1, generator=g, dtype=torch.float64).tolist()
        found = places[kind]
        order = torch.randperm(len(found), generator=g).tolist()
        name, draws[0], draws[1] = found[min(order, key=lambda j: shown[found[j][0]])]
        shown[name] += 1
        if kind == INVARIANT:
            masked = source.load(choice(kind, draws[:3])[1]).mask is not None
            for mode in torch.rand(TRIES, generator=g, dtype=torch.float64).tolist():
                if draw_cut(source.options, kind, masked, draws[3:-1]).mode != "whole":
                    break
                draws[3] = mode
        pairs.append((kind, draws))
    return pairs


def _places(choice: Choice, kind: int) -> list[tuple[str, float, float]]:
    """What can be shown: by what it counts as the same, and the two draws that lead `choice` to it."""
    variant = kind == VARIANT
    groups, shares = (choice.subjects, choice.shares) if variant else (choice.loose, choice.loose_shares)
    ends, subjects, found = (shares / shares[-1:]).tolist(), {group.name for group in choice.subjects}, []
    for group, low, high in zip(groups, [0.0, *ends], ends):
        for number, view in enumerate(group.views):
            name = group.name if group.name in subjects else view.name
            found.append((name, (low + high) / 2, (number + 0.5) / len(group.views)))
    return found


def _wrap(text: str, font: Any, width: int, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            if len(lines) == most:
                lines[-1] += " ..."
                break
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
