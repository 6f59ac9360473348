"""How well one number controls a method: measures of a sweep of FlexIP's gate, or of an IP-Adapter's scale on equal terms.

control(scores)              every measure of one sweep, with the lines that it should pass
compare(ours, baseline)      the same of two sweeps, side by side
refinement(scores)           the gates between which to look again; refined(coarse, fine) puts both sweeps together

The unit of the knob is a tenth of the sweep: a step is what a score does over any tenth (measuring/smoothness.py), so that 11 gates, 21
gates and a refined sweep are measured by the same lines. Ranks and the area are of the gates as they were sampled.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..measuring import smoothness
from ..measuring.scores_file import Scores
from .curves import PRIMARY, TENTHS, Columns, Curves, case_of

LOW, HIGH = 1, 9  # tenths: the usable range is measured between them
FINE = 21  # gates of a refined stretch, both its ends included
LEAST_WAY = 1e-6  # of a mean curve; below it there is no range to take a share of, and the difference between two methods does not count
LEAST_RANGE = 0.05  # of one case; below it the case does not move
SAME_RUN = (
    "base",
    "sampler_name",
    "scheduler",
    "steps",
    "cfg",
    "denoise",
    "width",
    "height",
    "seed",
    "seeds",
)  # of a header


@dataclass(frozen=True)
class Box:
    """Its lower left corner is the reference point of the area, its sides are the units of both axes."""

    text: tuple[float, float]
    subject: tuple[float, float]

    def joined(self, other: Box) -> Box:
        return Box(_hull(self.text, other.text), _hull(self.subject, other.subject))


@dataclass(frozen=True)
class Measure:
    name: str
    column: str  # of which score; "" if of none
    value: float | None
    wants: str  # the line, or what to do with the number
    met: bool | None  # None: there is no pass line for this number alone
    note: str  # where, of how many; or why there is no value


@dataclass(frozen=True)
class Control:
    method: str
    knob: str  # "gate", or "scale"
    gates: tuple[float, ...]
    cases: int
    subjects: int
    columns: Mapping[str, str]  # column -> the model behind it
    curves: Mapping[str, tuple[float, ...]]  # column -> means over the cases
    box: Box | None
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class GateComparison:
    ours: Control
    baseline: Control
    differences: tuple[str, ...]  # in how they were sampled, one sentence each


class Found(NamedTuple):
    value: float | None
    note: str = ""


# Each takes the sweep and, of one score, the cases (g, n) or their features (g, n, f). ------------------------------


def _monotone(sweep: Curves, cases: Tensor) -> Found:
    curve = cases.mean(1).round(decimals=12)  # rounding of sums must not rank equal means
    return Found(smoothness.spearman(curve).item())


def _monotone_cases(sweep: Curves, cases: Tensor) -> Found:
    rising = smoothness.spearman(cases)
    return Found(rising.mean().item(), f"{int((rising >= 0.95).sum())} of {len(rising)} cases reach 0.95")


def _jump_share(sweep: Curves, cases: Tensor) -> Found:
    curve = cases.mean(1)
    if (curve[-1] - curve[0]).abs() < LEAST_WAY:
        return Found(None, "The curve ends where it begins: there is no range to share.")
    begins, ways = smoothness.steps(curve, sweep.places)
    begin = begins[ways.argmax()].item()
    note = f"largest from {sweep.between(begin, begin + 1)}"
    gaps, ways = sweep.places.diff(), curve.diff().abs() / (curve[-1] - curve[0]).abs()
    fine = gaps < gaps.max() - 1e-6  # in a refined stretch: is it one cliff or a slope?
    if fine.any():
        at = int(ways.where(fine, -1).argmax())
        note += f"; in the refined stretch at most {ways[at]:.3f} at once, {_pair(sweep, at)}"
    return Found(smoothness.jump_share(curve, sweep.places), note)


def _case_jump_share(sweep: Curves, cases: Tensor) -> Found:
    share, moving = smoothness.case_jump_share(cases, LEAST_RANGE, sweep.places)
    note = f"{moving} of {cases.shape[1]} cases move by {LEAST_RANGE:g} or more"
    return Found(share if moving else None, note)


def _lipschitz(sweep: Curves, features: Tensor) -> Found:
    ratios = smoothness.step_ratios(features, sweep.places)
    return Found(ratios.mean().item(), f"median {ratios.median().item():.3f}")


def _lipschitz_99(sweep: Curves, features: Tensor) -> Found:
    ratios = smoothness.step_ratios(features, sweep.places)
    return Found(ratios.quantile(0.99).item(), f"of {len(ratios)} cases, largest {ratios.max().item():.3f}")


def _gain(sweep: Curves, cases: Tensor) -> Found:
    low, high = smoothness.interpolated(cases.mean(1), sweep.places, torch.tensor([LOW, HIGH], dtype=torch.float64))
    return Found((high - low).item(), f"from {sweep.between(LOW, HIGH)}")


def _loss(sweep: Curves, cases: Tensor) -> Found:
    return _gain(sweep, -cases)


def _linearity(sweep: Curves, cases: Tensor) -> Found:
    curve = cases.mean(1)
    if curve.amax() - curve.amin() < LEAST_WAY:
        return Found(None, "The curve does not move.")
    return Found(smoothness.straightness(curve, sweep.places))


def _area(sweep: Curves, box: Box | None) -> Found:
    curves = [sweep.of(name).mean(1) for name in (sweep.columns.text, sweep.columns.subject)]
    (x, right), (y, top) = box.text, box.subject
    if min(right - x, top - y) < LEAST_WAY:
        return Found(None, "One of the two scores does not move: there is no front.")
    points = torch.stack([(curves[0] - x) / (right - x), (curves[1] - y) / (top - y)], dim=1)
    note = (
        f"share of the box {sweep.columns.text} {x:.4f} to {right:.4f}, {sweep.columns.subject} {y:.4f} to {top:.4f}; "
        f"reference point ({x:.4f}, {y:.4f}); stairs through {len(points)} settings"
    )
    return Found(hypervolume(points.tolist()), note)


# The table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    name: str
    of: str  # "text", "image", "subject": the cases of that score; "features"; "front": the box
    wants: str
    find: Callable[[Curves, Any], Found]
    meets: Callable[[float], bool] | None = None
    beats: Callable[[float, float], bool] | None = None  # (ours, the baseline's)
    falling: bool = False  # it is the negative of the score that is measured


AREA = "area under the front"
_LIPSCHITZ = "Lipschitz: largest / mean DINO step"
_EACH = ("image", "subject", "text")
_LINES = (
    *(
        _Line("monotone, mean curve", of, ">= 0.95", _monotone, lambda v: v >= 0.95, falling=of == "text")
        for of in _EACH
    ),
    *(_Line("monotone, mean over cases", of, "report", _monotone_cases, falling=of == "text") for of in _EACH),
    *(_Line("largest jump share, mean curve", of, "< 0.25", _jump_share, lambda v: v < 0.25) for of in _EACH),
    *(
        _Line(
            "largest jump share, mean over cases",
            of,
            "lower than baseline",
            _case_jump_share,
            beats=lambda ours, theirs: ours < theirs - LEAST_WAY,
        )
        for of in _EACH
    ),
    _Line(f"{_LIPSCHITZ}, mean over cases", "features", "< 2.5", _lipschitz, lambda v: v < 2.5),
    _Line(f"{_LIPSCHITZ}, 99th percentile", "features", "report", _lipschitz_99),
    _Line("usable range: gain", "subject", "gain >> loss", _gain),
    _Line("usable range: loss", "text", "gain >> loss", _loss),
    _Line(AREA, "front", "larger than baseline", _area, beats=lambda ours, theirs: ours > theirs + LEAST_WAY),
    *(_Line("linearity, R² of the mean curve", of, "report", _linearity) for of in _EACH),
)


def control(scores: Scores, columns: Columns = PRIMARY, box: Box | None = None) -> Control:
    """Every measure of a sweep. The area is measured in `box`, or in the sweep's own if there is none.

    ValueError if the sweep has fewer than 3 gates, or not every case at every gate.
    """
    return _control(Curves(scores, columns), box)


def _control(sweep: Curves, box: Box | None) -> Control:
    scores, box = sweep.scores, box or own_box(sweep)
    curves = {}
    for column in sweep.columns.names():
        try:
            curves[column] = tuple(sweep.of(column).mean(1).tolist())
        except LookupError:
            pass  # the measures say why
    return Control(
        method=scores.method,
        knob=sweep.knob,
        gates=sweep.gates,
        cases=len(sweep.cases),
        subjects=len(sweep.subjects),
        columns={column: scores.columns.get(column, "") for column in sweep.columns.names()},
        curves=curves,
        box=box,
        measures=tuple(_measure(line, sweep, box) for line in _LINES),
    )


def _measure(line: _Line, sweep: Curves, box: Box | None) -> Measure:
    columns = sweep.columns
    others = {"features": "", "front": f"{columns.text}, {columns.subject}"}
    column = others[line.of] if line.of in others else getattr(columns, line.of)
    try:
        if line.of == "front":
            found = line.find(sweep, box)
        elif line.of == "features":
            found = line.find(sweep, sweep.features())
        else:
            found = line.find(sweep, -sweep.of(column) if line.falling else sweep.of(column))
    except LookupError as reason:
        found = Found(None, str(reason.args[0]))
    met = line.meets(found.value) if line.meets and found.value is not None else None
    return Measure(line.name, f"-{column}" if line.falling else column, found.value, line.wants, met, found.note)


def own_box(sweep: Curves) -> Box | None:
    try:
        text, subject = (sweep.of(name).mean(1) for name in (sweep.columns.text, sweep.columns.subject))
    except LookupError:
        return None
    return Box((text.min().item(), text.max().item()), (subject.min().item(), subject.max().item()))


def hypervolume(points: Sequence[Sequence[float]], reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """The area in which at least one of the points (x, y) is better in both, as far as it is better than `reference`."""
    area, height = 0.0, reference[1]
    for x, y in sorted(points, reverse=True):  # from the right, each adds what rises above those before it
        if y > height and x > reference[0]:
            area += (x - reference[0]) * (y - height)
            height = y
    return area


# A closer look -------------------------------------------------------------------------------------------------------


def refinement(scores: Scores, columns: Columns = PRIMARY) -> tuple[float, ...]:
    """The gates to add: 21 evenly from one gate to its neighbour where the mean DINO-I makes its largest jump, without these two."""
    sweep = Curves(scores, columns)
    try:
        curve = sweep.of(columns.subject).mean(1)
    except LookupError as reason:
        raise ValueError(f"{scores.method} cannot be refined: {reason.args[0]}") from None
    at = int((curve[1:] - curve[:-1]).abs().argmax())
    low, high = sweep.gates[at : at + 2]
    return tuple(round(low + (high - low) * i / (FINE - 1), 6) for i in range(1, FINE - 1))


def refined(coarse: Scores, fine: Scores) -> Scores:
    """One sweep of both: all of `coarse`, and of `fine` the gates that `coarse` lacks."""
    for what, ours, theirs in (
        ("methods", coarse.method, fine.method),
        ("models", dict(coarse.columns), dict(fine.columns)),
        ("cases", {case_of(row) for row in coarse.rows}, {case_of(row) for row in fine.rows}),
        ("knobs", coarse.header.get("knob"), fine.header.get("knob")),
    ):
        if ours != theirs:
            raise ValueError(f"The coarse and the fine sweep of {coarse.method} have different {what}; sweep it again.")
    unlike = _differences(coarse, fine)
    if unlike:
        raise ValueError(f"The fine sweep of {coarse.method} does not continue the coarse one: {unlike[0]}")
    known = set(coarse.gates)
    new = [number for number, row in enumerate(fine.rows) if row.gate is not None and row.gate not in known]
    features = None
    if coarse.features is not None and fine.features is not None:
        features = torch.cat([coarse.features, fine.features[new]])
    added, knobs = {fine.rows[number].gate for number in new}, f"{coarse.header.get('knob', 'gate')}s"
    header = {**coarse.header, knobs: sorted({*coarse.gates, *added}), "refined": sorted(added)}
    rows = (*coarse.rows, *(fine.rows[number] for number in new))
    return dataclasses.replace(coarse, header=header, rows=rows, features=features)


# Two methods ---------------------------------------------------------------------------------------------------------


def compare(ours: Scores, baseline: Scores, columns: Columns = PRIMARY) -> GateComparison:
    """Both sweeps by the same measures, the area in the box around both.

    ValueError, one sentence, if they have other cases, other models behind a column, or not as many gates.
    """
    a, b = Curves(ours, columns), Curves(baseline, columns)
    names = f"{ours.method} and {baseline.method}"
    if a.cases != b.cases:
        apart = len(set(a.cases) ^ set(b.cases))
        raise ValueError(f"{names} show different cases ({apart} are in one only); score both on the same ones.")
    if len(a.gates) != len(b.gates):
        raise ValueError(
            f"{names} were swept over {len(a.gates)} and {len(b.gates)} gates; sweep both over the same number."
        )
    for column in columns.names():
        models = [scores.columns.get(column) for scores in (ours, baseline)]
        if models[0] != models[1]:
            raise ValueError(
                f"{names} have different models behind {column} ({models[0]}; {models[1]}); score both with the same."
            )
    boxes = own_box(a), own_box(b)
    box = boxes[0].joined(boxes[1]) if all(boxes) else None
    found, theirs = _control(a, box), _control(b, box)
    measures = tuple(
        dataclasses.replace(mine, met=line.beats(mine.value, other.value))
        if line.beats and None not in (mine.value, other.value)
        else mine
        for line, mine, other in zip(_LINES, found.measures, theirs.measures, strict=True)
    )
    return GateComparison(dataclasses.replace(found, measures=measures), theirs, _differences(ours, baseline))


def _differences(a: Scores, b: Scores) -> tuple[str, ...]:
    return tuple(
        f"{key} {_short(a.header[key])} of {a.method}, {_short(b.header[key])} of {b.method}."
        for key in SAME_RUN
        if key in a.header and key in b.header and a.header[key] != b.header[key]
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def to_json(result: Control | GateComparison) -> dict[str, Any]:
    return dataclasses.asdict(result)


def markdown(result: Control | GateComparison) -> str:
    if isinstance(result, GateComparison):
        return _side_by_side(result)
    header = ["measure", "score", "value", "wants", "met", "note"]
    rows = [[m.name, m.column, _number(m.value), m.wants, _yes(m.met), m.note] for m in result.measures]
    return "\n\n".join([_about(result), _models(result), _grid(header, rows)])


def _side_by_side(result: GateComparison) -> str:
    ours, theirs = result.ours, result.baseline
    header = ["measure", "score", ours.method, theirs.method, "wants", f"{ours.method} meets", f"{theirs.method} meets"]
    rows, notes = [], []
    for a, b in zip(ours.measures, theirs.measures, strict=True):
        rows.append([a.name, a.column, _number(a.value), _number(b.value), a.wants, _yes(a.met), _yes(b.met)])
        if a.name == AREA or a.value is None or b.value is None:
            told = [note for note in dict.fromkeys((a.note, b.note)) if note]
            notes.append(f"- {a.name} ({a.column or 'features'}): {' '.join(told)}.".replace("..", "."))
    notes += [f"- Not on equal terms: {difference}" for difference in result.differences]
    return "\n\n".join(
        [_about(ours), _about(theirs), _models(ours), _grid(header, rows), *(["\n".join(notes)] if notes else [])]
    )


def _about(result: Control) -> str:
    gates = result.gates
    text = (
        f"**{result.method}**: {len(gates)} gates, {result.knob} {gates[0]:g} to {gates[-1]:g}; "
        f"{result.cases} cases of {result.subjects} subjects, the same noise at every {result.knob}."
    )
    widest = max(b - a for a, b in itertools.pairwise(gates)) / (gates[-1] - gates[0]) * TENTHS
    if widest > 1 + 1e-6:
        text += (
            f" Some neighbours are {widest / TENTHS:.2g} of the sweep apart: what jumps between them is taken as even "
            "there, so the true jump shares and Lipschitz may be larger."
        )
    return text


def _models(result: Control) -> str:
    models = [f"- {column}: {model or 'model not named'}" for column, model in result.columns.items()]
    told = "A step is what a score does over any tenth of the sweep; an even one has a jump share of 0.1."
    return "\n".join(models) + f"\n\n{told}"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _yes(met: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[met]


def _pair(sweep: Curves, at: int) -> str:
    return f"{sweep.knob} {sweep.gates[at]:.4g} to {sweep.gates[at + 1]:.4g}"


def _hull(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return min(*a, *b), max(*a, *b)
