"""Small line plots, drawn with PIL alone. Its own font has Latin letters only, so write "gate", not a Greek letter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (70, 70, 70))
"""Okabe and Ito's colours: as distinct for colour-blind eyes as for others."""
PAPER, INK, FAINT, GRID, MARK = (255, 255, 255), (30, 30, 30), (95, 95, 95), (218, 218, 218), (125, 125, 125)
BAND = 60  # opacity of a spread, of 255
X_TICKS, Y_TICKS = 10, 7  # at most, where there is room
SMALLEST = 8  # letters
FINE = 3  # drawn this many times larger, then averaged down: lines and letters without stairs


@dataclass(frozen=True)
class Series:
    """One line. A value that is not a number leaves a gap; `spread` is a (lower, upper) band per point; `points` draws dots."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    spread: Sequence[tuple[float, float]] | None = None
    points: bool = False

    def __post_init__(self) -> None:
        lengths = {len(self.xs), len(self.ys), len(self.xs if self.spread is None else self.spread)}
        if len(lengths) > 1:
            raise ValueError(f"series {self.name!r}: xs, ys and spread have different lengths {sorted(lengths)}.")


def line_plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    title: str = "",
    size: tuple[int, int] = (480, 320),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> torch.Tensor:
    """A picture (1, H, W, 3) in 0..1 for `size` (W, H): axes, lines, a legend for several series, vertical `marks` (x, label).

    Ranges not given come from the data; what lies outside a given range is cut off, marks too.
    """
    legend = [s.name for s in series] if len(series) > 1 else []
    points = [(s, i) for s in series for run in _runs(s) for i in run]
    xs = [s.xs[i] for s, i in points]
    ys = [y for s, i in points for y in (s.ys[i], *(s.spread[i] if s.spread is not None else ()))]
    x_range = _extent(x_range or [*xs, *(x for x, _ in marks)])
    y_range = _extent(y_range) if y_range else _rounded(_extent(ys), Y_TICKS)
    marks = sorted((x, label) for x, label in marks if x_range[0] <= x <= x_range[1])
    whole = bool(xs) and all(float(x).is_integer() for x in xs)

    for letter in range(max(SMALLEST, min(40, round(min(size[0] / 30, size[1] / 20)))), SMALLEST - 1, -1):
        canvas = Canvas(size, letter)
        box = canvas.frame(title, legend, y_label, x_range, y_range, marks, whole)
        if box[3] - box[1] > 0.4 * canvas.size[1]:  # the words leave enough for the lines
            break
    canvas.axes(box, x_range, y_range, whole, x_label)
    layer = canvas.image.copy()
    for number, s in enumerate(series):
        _draw_series(layer, box, s, COLOURS[number % len(COLOURS)], x_range, y_range, canvas.stroke)
    canvas.paste_lines(layer, box)
    if not points:
        canvas.draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), "no values", FAINT, canvas.font, anchor="mm")
    return canvas.picture()


class Canvas:
    """The drawing surface with its font; all coordinates are in fine pixels."""

    def __init__(self, size: tuple[int, int], letter: int):
        self.letter = FINE * letter
        self.line = round(self.letter * 1.35)
        self.gap = round(self.letter * 0.6)
        self.stroke = max(FINE, round(self.letter * 0.17))
        self.size = (size[0] * FINE, size[1] * FINE)
        self.image = Image.new("RGB", self.size, PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(size=self.letter)

    def width(self, text: str) -> float:
        return self.draw.textlength(text, self.font)

    def widest(self, labels: list[tuple[float, str]]) -> float:
        return max((self.width(text) for _, text in labels), default=0)

    def fit(self, text: str, room: float) -> str:
        """`text`, or as much of it as fits into `room`."""
        if self.width(text) <= room:
            return text
        while text and self.width(text + "...") > room:
            text = text[:-1]
        return text.rstrip() + "..."

    def frame(
        self,
        title: str,
        legend: list[str],
        y_label: str,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        marks: list[tuple[float, str]],
        whole: bool,
    ) -> tuple[float, float, float, float]:
        """Write title, legend, y label and marks; what they leave is for the lines: (left, top, right, bottom)."""
        left = 2 * self.gap + self.widest(ticks(*y_range, Y_TICKS))
        right = self.size[0] - self.gap - self.widest(ticks(*x_range, X_TICKS, whole)) / 2
        bottom = self.size[1] - 2 * self.line - self.gap
        labels = [self.fit(label, self.size[0] - 2 * self.gap) for _, label in marks]
        columns = [_place(x, x_range, left, right) for x, _ in marks]
        rows = self.mark_rows(list(zip(columns, labels)), beside=y_label)
        top = self.legend(legend, self.text_row(title, self.gap, bold=True))
        top += self.line * max((row for row, _ in rows), default=0)
        top = self.text_row(y_label or " " * bool(marks), top)
        box = (left, min(top + self.gap, bottom - 3 * self.line), right, bottom)
        for x, label, (row, start) in zip(columns, labels, rows):
            self.mark(box, x, label, start, top - (row + 1) * self.line)
        return box

    def text_row(self, text: str, top: float, bold: bool = False) -> float:
        """Write one line, return where the next one begins."""
        if not text:
            return top
        text = self.fit(text, self.size[0] - 2 * self.gap)
        self.draw.text((self.gap, top), text, INK if bold else FAINT, self.font, stroke_width=bold * FINE / 6)
        return top + self.line

    def legend(self, names: list[str], top: float) -> float:
        """Names with their colours, in as many rows as they need."""
        swatch, left = 1.4 * self.letter, self.gap
        for number, name in enumerate(names):
            name = self.fit(name, self.size[0] - 2 * self.gap - swatch)
            needed = swatch + self.width(name)
            if left > self.gap and left + needed > self.size[0] - self.gap:
                left, top = self.gap, top + self.line
            middle = top + self.letter * 0.6
            colour = COLOURS[number % len(COLOURS)]
            self.draw.line((left, middle, left + self.letter, middle), colour, self.stroke * 2)
            self.draw.text((left + swatch, top), name, INK, self.font)
            left += needed + self.letter
        return top + self.line if names else top

    def mark_rows(self, marks: list[tuple[float, str]], beside: str) -> list[tuple[int, float]]:
        """(row, left edge) of each mark's label: rows upwards from that of `beside`, so that no two labels overlap."""
        ends = [self.gap + self.width(beside)]
        places = []
        for x, label in marks:
            width = self.width(label)
            start = max(self.gap, min(x - width / 2, self.size[0] - self.gap - width))
            row = next((row for row, end in enumerate(ends) if end + self.gap <= start), len(ends))
            ends[row : row + 1] = [start + width]
            places.append((row, start))
        return places

    def mark(self, box: tuple, x: float, label: str, start: float, top: float) -> None:
        dash = self.gap // 2
        for y in range(round(box[1]), round(box[3]), 2 * dash):
            self.draw.line((x, y, x, min(y + dash, box[3])), MARK, self.stroke // 2)
        self.draw.text((start, top), label, FAINT, self.font)

    def axes(self, box: tuple, x_range: tuple, y_range: tuple, whole: bool, x_label: str) -> None:
        left, top, right, bottom = box
        thin = max(1, FINE // 2)
        for value, text in self.y_ticks(y_range, bottom - top):
            y = _place(value, y_range, bottom, top)
            self.draw.line((left, y, right, y), GRID, thin)
            self.draw.text((left - self.gap, y), text, FAINT, self.font, anchor="rm")
        for value, text in self.x_ticks(x_range, right - left, whole):
            x = _place(value, x_range, left, right)
            self.draw.line((x, bottom, x, bottom + self.gap / 2), FAINT, thin)
            self.draw.text((x, bottom + self.gap * 0.7), text, FAINT, self.font, anchor="mt")
        self.draw.line((left, bottom, right, bottom), FAINT, thin)
        self.draw.line((left, top, left, bottom), FAINT, thin)
        label = self.fit(x_label, right - left)
        self.draw.text(((left + right) / 2, self.size[1] - self.gap), label, FAINT, self.font, anchor="ms")

    def y_ticks(self, y_range: tuple[float, float], room: float) -> list[tuple[float, str]]:
        return ticks(*y_range, most=max(2, min(Y_TICKS, int(room / (1.6 * self.line)))))

    def x_ticks(self, x_range: tuple[float, float], room: float, whole: bool) -> list[tuple[float, str]]:
        """As many as fit beside each other with space between them."""
        for most in range(X_TICKS, 1, -1):
            found = ticks(*x_range, most, whole)
            if sum(self.width(text) + 1.2 * self.letter for _, text in found) <= room:
                break
        return found

    def paste_lines(self, layer: Image.Image, box: tuple) -> None:
        """Only the inside of the axes, and the half of a stroke or dot that stands on their edge."""
        edge = 2 * self.stroke
        area = (round(box[0]) - edge, round(box[1]) - edge, round(box[2]) + edge, round(box[3]) + edge)
        self.image.paste(layer.crop(area), area[:2])

    def picture(self) -> torch.Tensor:
        pixels = np.asarray(self.image.reduce(FINE)).astype(np.float32) / 255
        return torch.from_numpy(pixels).unsqueeze(0)


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[tuple[float, str]]:
    """About `most` round numbers from low to high as (value, text), or fewer; `whole` wants integers."""
    step = max(_step(high - low, most), 1.0) if whole else _step(high - low, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, _number(i * step, step)) for i in range(first, last + 1)]


def _number(value: float, step: float) -> str:
    """As many digits as it takes to tell `value` from the next step."""
    decimals = -math.floor(math.log10(step) + 1e-9)
    if decimals <= 5 and abs(value) < 1e6:
        return f"{value + 0.0:.{max(0, decimals)}f}"  # + 0.0: no minus zero
    before_point = math.floor(math.log10(abs(value)) + 1e-9) + 1 if value else 1
    return f"{value:.{max(1, before_point + decimals)}g}"


def _step(span: float, most: int) -> float:
    """The smallest of ..., 0.5, 1, 2, 5, 10, ... that goes at most `most` times into `span`."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(s * power for s in (1, 2, 5, 10, 20) if span / (s * power) <= most + 1e-9)


def _extent(values: Iterable[float]) -> tuple[float, float]:
    """Smallest and largest value that can be drawn; around a single value there is room on both sides."""
    drawable = [value for value in values if _drawable(value)]
    if not drawable:
        return 0.0, 1.0
    low, high = min(drawable), max(drawable)
    largest = max(abs(low), abs(high))
    if high - low > 1e-9 * largest + 1e-30:
        return low, high
    room = largest * 0.1 if largest > 1e-20 else 0.5
    return low - room, high + room


def _drawable(value: float) -> bool:
    return abs(value) < 1e30  # not for nan and infinity


def _rounded(extent: tuple[float, float], most: int) -> tuple[float, float]:
    """Widened to the next ticks, so that the axis begins and ends with a number."""
    step = _step(extent[1] - extent[0], most)
    return math.floor(extent[0] / step + 1e-9) * step, math.ceil(extent[1] / step - 1e-9) * step


def _place(value: float, extent: tuple[float, float], start: float, end: float) -> float:
    return start + (value - extent[0]) / (extent[1] - extent[0]) * (end - start)


def _runs(s: Series) -> list[list[int]]:
    """Indices of the points between the gaps."""
    runs: list[list[int]] = [[]]
    for i, (x, y) in enumerate(zip(s.xs, s.ys)):
        if _drawable(x) and _drawable(y):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _draw_series(
    image: Image.Image, box: tuple, s: Series, colour: tuple, x_range: tuple, y_range: tuple, stroke: int
) -> None:
    draw = ImageDraw.Draw(image, "RGBA")
    left, top, right, bottom = box

    def at(x: float, y: float) -> tuple[float, float]:
        far = 4 * (bottom - top)  # enough to leave the picture, small enough for PIL
        return _place(x, x_range, left, right), max(top - far, min(bottom + far, _place(y, y_range, bottom, top)))

    for run in _runs(s):
        line = [at(s.xs[i], s.ys[i]) for i in run]
        banded = [i for i in run if s.spread is not None and all(map(_drawable, s.spread[i]))]
        if len(banded) > 1:
            lower = [at(s.xs[i], s.spread[i][0]) for i in banded]
            upper = [at(s.xs[i], s.spread[i][1]) for i in reversed(banded)]
            draw.polygon(lower + upper, fill=(*colour, BAND))
        if len(line) > 1:
            draw.line(line, colour, stroke, joint="curve")
        if s.points or len(line) == 1:
            for x, y in line:
                draw.circle((x, y), 1.7 * stroke, colour)
