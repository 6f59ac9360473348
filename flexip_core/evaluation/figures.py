"""Figures of swept methods: the knob against each score, the preservation-personalization front, and gates side by side.

Each ends in a file, .svg or .png by its name; the same scores give the same bytes. Text in an SVG stays text.
"""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files.weights import write_atomically
from ..measuring.scores_file import Scores
from ..pictures.contact_sheet import contact_sheet
from ..pictures.plots import COLOURS
from .curves import PRIMARY, TENTHS, Columns, Curves
from .metrics import read_picture
from .statistics import interval

MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # colours alone do not survive a grey print
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
DPI = 150
SMALL = 8  # letters
MOST_NUMBERED = 3  # methods whose gates have room for a number each; of more, only the ends have
NEAR = 9  # points
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dadada",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "flexip",
    "path.simplify": False,
}
PUBLISHED = "#464646"
THIN, BAND = 0.35, 0.18  # opacity


@dataclass(frozen=True)
class SheetRow:
    """One case: what it is called, its reference, and its picture at each gate, or by each method."""

    label: str
    reference: Path
    pictures: Sequence[Path]


def gate_curves(
    methods: Sequence[Scores], path: Path, columns: Sequence[str] = PRIMARY.names(), each_subject: bool = False
) -> None:
    """A panel per score: its mean at each gate of each method, the 95 % bootstrap band over subjects, one thin line per subject."""
    if not methods:
        raise ValueError("There is no sweep to draw curves of.")
    sweeps = [Curves(scores) for scores in methods]
    _check(methods, columns)
    with _figure(path, (max(5.4, 4.1 * len(columns)), 3.6), len(columns)) as (figure, axes):
        for ax, column in zip(axes, columns, strict=True):
            for number, sweep in enumerate(sweeps):
                _curve(ax, sweep, column, number, each_subject)
            ax.set_title(_model(methods, column, 56), fontsize=SMALL)
            ax.set_xlabel(_knobs(sweeps))
            ax.set_ylabel(column)
        told = "mean over the cases" + (
            "; band: 95 % bootstrap interval over subjects" if any(len(s.subjects) > 1 for s in sweeps) else ""
        )
        _legend(figure, axes[0], told + ("; thin: single subjects" if each_subject else ""))


def _curve(ax: Any, sweep: Curves, column: str, number: int, each_subject: bool) -> None:
    cases, subjects = _cases(sweep, column), sweep.subjects
    of_subject = torch.tensor([[case[0] == subject for case in sweep.cases] for subject in subjects]).double()  # (s, n)
    sums, counts = cases @ of_subject.T, of_subject.sum(1)  # (g, s), (s,)
    colour = _colour(number)
    if each_subject:
        thin = (sums / counts).numpy()
        ax.plot(sweep.gates, thin, color=colour, linewidth=0.6, alpha=THIN, zorder=1.5)
    if len(subjects) > 1:
        bands = [interval(row.numpy(), counts.numpy()) for row in sums]
        ax.fill_between(sweep.gates, *zip(*bands, strict=True), color=colour, alpha=BAND, linewidth=0)
    ax.plot(
        sweep.gates,
        cases.mean(1).numpy(),
        **_look(number),
        linestyle=LINES[number % len(LINES)],
        markersize=4 if len(sweep.gates) <= 21 else 2,
        label=sweep.scores.method,
    )


def front(
    swept: Sequence[Scores],
    path: Path,
    fixed: Sequence[Scores] = (),
    published: Sequence[tuple[str, float, float]] = (),
    columns: Columns = PRIMARY,
) -> None:
    """Text followed against subject kept: a curve per swept method, a point per method with one setting.

    `published`: (name, text, subject) of a paper's table; other encoders may be behind those, and the figure says so.
    """
    if not (swept or fixed or published):
        raise ValueError("There is no method to draw a front of.")
    _check([*swept, *fixed], (columns.text, columns.subject))
    sweeps = [Curves(scores, columns) for scores in swept]
    with _figure(path, (7.2, 5.4), 1) as (figure, (ax,)):
        labels: list[_Label] = []
        lines: list[np.ndarray] = []
        for number, sweep in enumerate(sweeps):
            points = np.stack([_cases(sweep, name).mean(1).numpy() for name in (columns.text, columns.subject)], 1)
            ax.plot(
                *points.T,
                **_look(number),
                linestyle=LINES[number % len(LINES)],
                markersize=4.5,
                label=sweep.scores.method,
            )
            lines.append(points)
            labels += _gate_labels(sweep, points, _colour(number), TENTHS if len(sweeps) > MOST_NUMBERED else 1)
        for number, scores in enumerate(fixed, len(sweeps)):
            point = tuple(_mean(scores, name) for name in (columns.text, columns.subject))
            ax.plot(*point, **_look(number), linestyle="", markersize=8, label=scores.method)
            lines.append(np.array([point]))
        if published:
            points = np.array([point for _, *point in published])
            ax.plot(*points.T, "x", color=PUBLISHED, markersize=6, label="published; other encoders may be behind them")
            lines.append(points)
            labels += [_Label(name, (x, y), PUBLISHED, needed=True) for name, x, y in published]
        ax.set_xlabel(f"{columns.text}: text followed")
        ax.set_ylabel(f"{columns.subject}: subject kept")
        models = {name: _model([*swept, *fixed], name, 95) for name in (columns.text, columns.subject)}
        told = "\n".join(f"{name}: {model}" for name, model in models.items() if model)
        ax.set_title(told, fontsize=SMALL, loc="left")
        ax.margins(0.1)
        numbers = f"numbers: {_knobs(sweeps)}; " if sweeps else ""
        _legend(figure, ax, f"{numbers}up and to the right is better")
        _place(figure, ax, labels, lines)


def gate_sheet(
    rows: Sequence[SheetRow], gates: Sequence[float], path: Path, knob: str = "gate", side: int = 192
) -> None:
    """Reference, then a column per gate; a row per case."""
    picture_sheet(rows, [f"{knob} {gate:g}" for gate in gates], path, side)


def picture_sheet(rows: Sequence[SheetRow], names: Sequence[str], path: Path, side: int = 192) -> None:
    """Reference, then a column for each of `names`; a row per case. Always a picture, .png or .jpg; each part `side` pixels wide and high."""
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
    if path.suffix.lower() not in formats:
        raise ValueError(f"{path.name}: a sheet of pictures is saved as .png or .jpg.")
    if not rows:
        raise ValueError("A sheet of pictures needs at least one case.")
    for row in rows:
        if len(row.pictures) != len(names):
            raise ValueError(f"{row.label} has {len(row.pictures)} pictures for {len(names)} columns.")
    columns = [[row.reference for row in rows], *([row.pictures[i] for row in rows] for i in range(len(names)))]
    parts = torch.stack([_part(picture, side) for column in columns for picture in column])
    pixels = (contact_sheet(parts, ["reference", *names], [row.label for row in rows])[0] * 255).round().byte().numpy()
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, formats[path.suffix.lower()], quality=92)
    write_atomically(path, data.getvalue())


# Parts of figures ----------------------------------------------------------------------------------------------------


@contextmanager
def _figure(path: Path, size: tuple[float, float], panels: int) -> Iterator[tuple[Any, Any]]:
    """A figure in our style, whatever the user's matplotlibrc says; it is saved when the block ends."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise ValueError(f"{path.name}: a figure is saved as .svg or .png.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("Figures need matplotlib: pip install matplotlib.") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(size, dpi=DPI, layout="constrained")
        yield figure, figure.subplots(1, panels, squeeze=False)[0]
        data = io.BytesIO()
        # neither the date nor the version, so that the same scores give the same bytes
        figure.savefig(
            data, format=kind, metadata={"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        )
    write_atomically(path, data.getvalue())


def _legend(figure: Any, ax: Any, told: str) -> None:
    """Below all panels, where nothing is drawn, with a line about what is drawn."""
    handles, names = ax.get_legend_handles_labels()
    wide = figure.get_figwidth()
    columns = max(1, min(len(names), int(wide / (0.8 + 0.09 * max(map(len, names), default=1)))))
    told = textwrap.fill(told, int(12 * wide))
    rows = -(-len(names) // columns) + 1 + told.count("\n")
    figure.set_figheight(figure.get_figheight() + 0.24 * rows)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, title=told, title_fontsize=9)


def _look(number: int) -> dict[str, Any]:
    return {"color": _colour(number), "marker": MARKERS[number % len(MARKERS)]}


def _colour(number: int) -> tuple[float, ...]:
    return tuple(value / 255 for value in COLOURS[number % len(COLOURS)])


@dataclass(frozen=True)
class _Label:
    text: str
    point: tuple[float, float]
    colour: Any
    needed: bool  # or left out where there is no room


def _gate_labels(sweep: Curves, points: np.ndarray, colour: Any, every: int) -> list[_Label]:
    """At regular steps along the sweep, the ends first: they get room before the others."""
    tenths = {i: round(place) for i, place in enumerate(sweep.places.tolist()) if abs(place - round(place)) < 1e-6}
    ends = 0, len(points) - 1
    inner = [i for i, tenth in tenths.items() if i not in ends and tenth % every == 0]
    return [
        _Label(f"{sweep.gates[i]:.3g}", tuple(points[i]), colour, i in ends and every == 1) for i in (*ends, *inner)
    ]


def _place(figure: Any, ax: Any, labels: Sequence[_Label], lines: Sequence[np.ndarray]) -> None:
    """Puts each label beside its point, where it covers no line, no point and no other label, all in pixels."""
    figure.draw_without_rendering()  # only now the layout is known
    figure.set_layout_engine("none")
    covered = np.concatenate([_along(ax.transData.transform(points)) for points in lines])  # (p, 2)
    inside, taken = ax.get_window_extent(), []
    for label in labels:
        best, cost, room = None, np.inf, None
        for far, dx, dy in _OFFSETS:
            if far > NEAR and not label.needed:
                break  # this far away it would not be clear which point it belongs to
            note = ax.annotate(
                label.text,
                label.point,
                (dx * far, dy * far),
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[dx],
                va={1: "bottom", 0: "center", -1: "top"}[dy],
                fontsize=SMALL,
                color=label.colour,
            )
            box = note.get_window_extent()
            hidden = ((covered > (box.x0, box.y0)) & (covered < (box.x1, box.y1))).all(1).sum()
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            its_cost = hidden + 1000 * sum(box.overlaps(other) for other in taken) + 1000 * outside
            if its_cost < cost:
                if best is not None:
                    best.remove()
                best, cost, room = note, its_cost, box
            else:
                note.remove()
        if cost and not label.needed:
            best.remove()
        else:
            taken.append(room)


_OFFSETS = tuple(
    (far, dx, dy)
    for far in (5, 9, 14, 20)  # points
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
)


def _along(points: np.ndarray) -> np.ndarray:
    """Points (n, 2) in pixels -> more of them, three pixels apart along the line through them."""
    parts = [points]
    for begin, end in itertools.pairwise(points):
        count = int(np.hypot(*(end - begin)) // 3)
        parts.append(begin + (end - begin) * np.linspace(0, 1, count + 1)[:, None])
    return np.concatenate(parts)


def _knobs(sweeps: Sequence[Curves]) -> str:
    return " or ".join(dict.fromkeys(sweep.knob for sweep in sweeps))


def _check(methods: Sequence[Scores], columns: Sequence[str]) -> None:
    for scores in methods:
        first = methods[0]
        for column in columns:
            if scores.columns.get(column) != first.columns.get(column):
                raise ValueError(
                    f"{scores.method} and {first.method} have different models behind {column}; they do not share an axis."
                )


def _cases(sweep: Curves, column: str) -> Tensor:
    try:
        return sweep.of(column)
    except LookupError as reason:
        raise ValueError(f"{sweep.scores.method} cannot be drawn: {reason.args[0]}") from None


def _mean(scores: Scores, column: str) -> float:
    values = [row.scores.get(column) for row in scores.rows]
    if not values or None in values:
        raise ValueError(f"{scores.method} cannot be drawn: {scores.missing.get(column, f'{column} was not scored.')}")
    return float(np.mean(values))


def _part(path: Path, side: int) -> Tensor:
    """(side, side, 3) in 0..1: the middle of the picture; the pixels of a small one stay sharp."""
    picture = read_picture(path)
    way = Image.Resampling.NEAREST if 2 * min(picture.size) <= side else Image.Resampling.LANCZOS
    return torch.from_numpy(np.array(ImageOps.fit(picture, (side, side), way))).float() / 255


def _model(methods: Sequence[Scores], column: str, width: int = 60) -> str:
    """What is behind a column, short enough for an axis: the table has the hashes."""
    text = next((scores.columns.get(column, "") for scores in methods), "")
    return "\n".join(textwrap.wrap(re.sub(r",? sha256 [0-9a-f]+", "", text), width))
