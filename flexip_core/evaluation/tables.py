"""Tables of several runs, among themselves and in the paper's Table 1: Markdown, CSV and JSON with the same numbers.

`compare` computes every number and refuses runs that do not compare; the rest only prints.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.weights import write_atomically
from ..measuring.scores_file import Scores
from .published import COLUMNS, comparable, inserted, mean_ranks, printed_mean_ranks, published, real_pictures, table1
from .statistics import Difference, Summary, by_category, by_gate, difference, summarize

SECOND_SET = ("CLIP-T (L/14)", "CLIP-I (L/14)", "DINO-I (DINOv2)")
CALIBRATION = "calibration"  # key of a run's header: column -> cosine of real pictures with other real ones
CALIBRATED_WITHIN = 0.005
MINI_WORLD = "mini world"  # how the benchmark of a header begins there

Summaries = Mapping[str, Summary]  # column -> summary


@dataclass(frozen=True)
class Line:
    """One run at one gate."""

    method: str
    label: str  # with the gate, if the run is a sweep
    knob: str  # what the gate is called there: gate, scale
    gate: float | None
    scores: Summaries
    by_category: Mapping[str, Summaries]
    by_gate: Mapping[float | None, Summaries]  # the whole sweep
    header: Mapping[str, Any]
    missing: Mapping[str, str]
    rank: float | None  # mRank among these runs
    placed: float | None  # mRank among these runs and Table 1's rows


@dataclass(frozen=True)
class Contrast:
    """Two runs on the same pictures: `first` minus `second`, by column."""

    first: str
    second: str
    scores: Mapping[str, Difference]


@dataclass(frozen=True)
class Comparison:
    columns: Mapping[str, str]  # column -> model
    ranked: tuple[str, ...]  # columns of mRank
    lines: tuple[Line, ...]
    table_1: Mapping[str, float]  # published method -> its mRank in the table with these runs inserted; may be empty
    placed_by: tuple[str, ...]  # columns of table_1's mRanks: those that compare with published scores
    differences: tuple[Contrast, ...]  # of every two runs
    calibration: Mapping[str, float]
    notes: tuple[str, ...]  # what a reader has to know about the ranks


def compare(
    runs: Sequence[Scores],
    gates: Mapping[str, float] | None = None,
    calibration: Mapping[str, float] | None = None,
) -> Comparison:
    """`gates`: method -> the gate at which a swept run takes part; without one, the one nearest the middle of its range.

    ValueError, one sentence, for runs of different models or pictures, for equal names, and for a gate that was not swept.
    """
    if not runs:
        raise ValueError("There are no scores to compare.")
    _check_names(runs, gates or {})
    chosen = [_gate(run, gates or {}) for run in runs]
    columns = _columns(runs)
    _check_pictures(runs, chosen)
    rows = [[row for row in run.rows if row.gate == gate] for run, gate in zip(runs, chosen, strict=True)]
    labels = [_label(run, gate) for run, gate in zip(runs, chosen, strict=True)]
    scores = [
        {c: summarize(part, c) for c in columns if c in run.columns} for run, part in zip(runs, rows, strict=True)
    ]
    ranked = tuple(column for column in COLUMNS if all(column in line for line in scores))
    means = {label: {c: line[c].mean for c in ranked} for label, line in zip(labels, scores, strict=True)}
    is_mini = any(str(run.header.get("benchmark", "")).startswith(MINI_WORLD) for run in runs)
    ranks = mean_ranks(means, ranked) if ranked else {}
    placed_by = () if is_mini else comparable(columns, ranked)
    places = inserted({_ours(label): line for label, line in means.items()}, placed_by) if placed_by else {}
    contrasts = tuple(
        Contrast(
            labels[i],
            labels[j],
            {c: difference(rows[i], rows[j], c) for c in columns if c in scores[i] and c in scores[j]},
        )
        for i, j in itertools.combinations(range(len(runs)), 2)
    )
    lines = tuple(
        Line(
            run.method,
            label,
            _knob(run),
            gate,
            line,
            _turned({column: by_category(part, column) for column in line}),
            _turned({column: by_gate(run.rows, column) for column in line}),
            {key: value for key, value in run.header.items() if key != CALIBRATION},
            run.missing,
            ranks.get(label),
            places.get(_ours(label)),
        )
        for run, label, gate, line, part in zip(runs, labels, chosen, scores, rows, strict=True)
    )
    if calibration is None:
        calibration = next((run.header[CALIBRATION] for run in runs if run.header.get(CALIBRATION)), {})
    return Comparison(
        columns,
        ranked,
        lines,
        {method: places[method] for method in table1()} if places else {},
        placed_by,
        contrasts,
        calibration,
        tuple(_notes(ranked, placed_by, [run.method for run in runs], labels, is_mini)),
    )


def _check_names(runs: Sequence[Scores], gates: Mapping[str, float]) -> None:
    names = [run.method for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two runs are called {', '.join(twice)}; score each under a name of its own.")
    unknown = sorted(set(gates) - set(names))
    if unknown:
        raise ValueError(f"A gate is given for {', '.join(unknown)}, but the runs are {', '.join(names)}.")


def _gate(run: Scores, gates: Mapping[str, float]) -> float | None:
    if not run.rows:
        raise ValueError(f"{run.method} has no pictures; score it again.")
    if any(row.gate is None for row in run.rows) and run.gates:
        raise ValueError(f"{run.method} has pictures with and without a gate; score it again.")
    return nearest_gate(run.method, run.gates, gates.get(run.method), _knob(run))


def nearest_gate(method: str, swept: Sequence[float], wanted: float | None, knob: str = "gate") -> float | None:
    """The wanted one of a sweep (in rising order), or the one nearest the middle of its range; None without a sweep."""
    if wanted is None:
        middle = sum((*swept[:1], *swept[-1:])) / 2
        return min(swept, key=lambda gate: (abs(gate - middle), gate), default=None)
    found = [gate for gate in swept if abs(gate - wanted) < 1e-6]
    if not found:
        there = ", ".join(f"{gate:g}" for gate in swept) or "none"
        raise ValueError(f"{method} was not scored at {knob} {wanted:g}; choose one of: {there}.")
    return found[0]


def _columns(runs: Sequence[Scores]) -> dict[str, str]:
    """Column -> model, the paper's columns first."""
    models: dict[str, str] = {}
    owner: dict[str, str] = {}
    for run in runs:
        for column, model in run.columns.items():
            if models.setdefault(column, model) != model:
                raise ValueError(
                    f"{column} was scored with {models[column]} in {owner[column]}, but with {model} in {run.method}; "
                    "score both with the same model."
                )
            owner.setdefault(column, run.method)
    order = [*COLUMNS, *SECOND_SET]
    return {column: models[column] for column in [*order, *sorted(set(models) - set(order))] if column in models}


def _check_pictures(runs: Sequence[Scores], gates: Sequence[float | None]) -> None:
    """Every gate of a run, and every run, must be of the same subjects, prompts and images."""
    first: set | None = None
    for run, gate in zip(runs, gates, strict=True):
        ours = _pictures(run, gate)
        for other in run.gates:
            _same(ours, _pictures(run, other), _label(run, gate), _label(run, other))
        first = ours if first is None else first
        _same(first, ours, runs[0].method, run.method)


def _pictures(run: Scores, gate: float | None) -> set[tuple[str, str, int]]:
    found = [(row.subject, row.case, row.image) for row in run.rows if row.gate == gate]
    if len(set(found)) < len(found):
        twice = next(key for key in found if found.count(key) > 1)
        raise ValueError(f"{run.method} has two scores of {_picture(twice)}; score it again.")
    return set(found)


def _same(ours: set, theirs: set, our_name: str, their_name: str) -> None:
    if ours == theirs:
        return
    sides = [(our_name, sorted(ours - theirs)), (their_name, sorted(theirs - ours))]
    only = "; ".join(
        f"{len(keys)} only in {name}, such as {', '.join(map(_picture, keys[:3]))}" for name, keys in sides if keys
    )
    raise ValueError(f"{our_name} and {their_name} are of different pictures ({only}); score both on the same cases.")


def _picture(key: tuple[str, str, int]) -> str:
    return f"{key[0]} / {key[1]} / {key[2]}"


def _notes(
    ranked: Sequence[str], placed_by: Sequence[str], names: Sequence[str], labels: Sequence[str], is_mini: bool
) -> Iterable[str]:
    if not ranked:
        yield f"No mRank: the runs share none of {', '.join(COLUMNS)}."
        return
    left_out = [column for column in COLUMNS if column not in ranked]
    which = f"the {len(ranked)} columns that all runs have, {', '.join(ranked)}" if left_out else f"{', '.join(ranked)}"
    yield (
        f"mRank is the mean rank (1 = best) over {which}, among the {len(labels)} runs here: {', '.join(labels)}. "
        "Ranks are those of the numbers as printed; equal ones share the better rank."
    )
    if any(label not in names for label in labels):
        yield "A run with several gates takes part with one of them, which its name says."
    if is_mini:
        yield "Runs of the mini world are not placed in the paper's Table 1: its judges are not CLIP and DINO."
    elif other := [column for column in ranked if column not in placed_by]:
        yield (
            f"{', '.join(other)} {'was' if len(other) == 1 else 'were'} scored with files that do not compare with published "
            "scores, so no run is placed in the paper's Table 1 by that."
        )


def _ours(label: str) -> str:
    return f"{label} (this run)"


def _label(run: Scores, gate: float | None) -> str:
    return run.method if gate is None else f"{run.method} ({_knob(run)} {_number(gate)})"


def _knob(run: Scores) -> str:
    return str(run.header.get("knob", "gate"))


def _turned(by_column: Mapping[str, Mapping[Any, Summary]]) -> dict[Any, dict[str, Summary]]:
    """column -> part -> summary to part -> column -> summary."""
    parts = next(iter(by_column.values()), {})
    return {part: {column: summaries[part] for column, summaries in by_column.items()} for part in parts}


# printing --------------------------------------------------------------------------------------------------------------


def to_markdown(comparison: Comparison) -> str:
    parts = [
        ["# Scores", _models(comparison)],
        ["## These runs", _runs(comparison), *map(_line, comparison.notes), _legend(), *_missing(comparison)],
        _differences(comparison),
        _in_table_1(comparison),
        _parts(comparison, "## By category", "category", lambda line: line.by_category),
        _parts(comparison, "## By gate", "gate", lambda line: line.by_gate),
        _calibration(comparison),
        ["## How these runs were made", *map(_made, comparison.lines)],
    ]
    return "\n\n".join(text for part in parts for text in part) + "\n"


def _models(comparison: Comparison) -> str:
    return "Columns: " + " · ".join(f"{column}: {_cell(model)}" for column, model in comparison.columns.items())


def _legend() -> str:
    return "Cells: mean ± standard deviation over pictures [95 % bootstrap interval of the mean over subjects]."


def _runs(comparison: Comparison) -> str:
    rows = [[line.label, _rank(line.rank), *_summaries(comparison, line.scores)] for line in comparison.lines]
    return _table(["method", "mRank", *comparison.columns, "images", "subjects"], rows)


def _missing(comparison: Comparison) -> list[str]:
    sentences: dict[tuple[str, str], list[str]] = {}
    for line in comparison.lines:
        for column, sentence in line.missing.items():
            sentences.setdefault((column, sentence), []).append(line.label)
    shown = [f"- {column} ({', '.join(labels)}): {_cell(text)}" for (column, text), labels in sentences.items()]
    return ["Not available:\n\n" + "\n".join(shown)] if shown else []


def _differences(comparison: Comparison) -> list[str]:
    if not comparison.differences:
        return []
    rows = [
        [f"{one.first} − {one.second}", *(_difference(one.scores.get(column)) for column in comparison.columns)]
        for one in comparison.differences
    ]
    return [
        "## Differences",
        _table(["methods", *comparison.columns], rows),
        "Cells: mean difference [paired 95 % bootstrap interval: each resample holds the same subjects for both]; bold where the interval leaves out 0.",
    ]


def _difference(found: Difference | None) -> str:
    if found is None:
        return "–"
    text = f"{found.mean:+.3f}" + (f" [{found.low:+.3f}, {found.high:+.3f}]" if found.low is not None else "")
    return f"**{text}**" if found.clear else text


def _in_table_1(comparison: Comparison) -> list[str]:
    if not comparison.table_1:
        return []
    printed, published_scores = printed_mean_ranks(), table1()
    ours = [
        (line.placed, [f"**{_ours(line.label)}**", _rank(line.placed), "–", *_means(comparison, line)])
        for line in comparison.lines
    ]
    theirs = [
        (rank, [name, _rank(rank), _rank(printed[name]), *(f"{published_scores[name][c]:.3f}" for c in COLUMNS)])
        for name, rank in comparison.table_1.items()
    ]
    rows = [row for _, row in sorted(ours + theirs, key=lambda pair: pair[0])]
    data = published()
    total = len(rows)
    return [
        "## In the paper's Table 1",
        _table(["method", f"mRank among these {total}", "mRank as published", *COLUMNS], rows),
        (
            f"mRank among these {total} is the mean rank over {', '.join(comparison.placed_by)}; every run that is added shifts "
            "the published rows, whose own mRank is over all five. Scores from models, pictures and settings that differ do not compare: read this as where the "
            "numbers would stand, not as a contest."
        ),
        "\n".join(f"- {note}" for note in data["table_1"]["notes"]),
        f"Source: {data['source']}, read from {data['read_from']}. {data['evidence']}",
    ]


def _means(comparison: Comparison, line: Line) -> list[str]:
    """What does not compare with the published numbers is not put below them."""
    shown = comparable({column: comparison.columns[column] for column in line.scores})
    return [f"{line.scores[column].mean:.3f}" if column in shown else "–" for column in COLUMNS]


def _parts(comparison: Comparison, title: str, name: str, parts: Any) -> list[str]:
    rows = [
        [line.label if name == "category" else line.method, _part(part), *_summaries(comparison, summaries)]
        for line in comparison.lines
        if len(parts(line)) > 1
        for part, summaries in parts(line).items()
    ]
    return [title, _table(["method", name, *comparison.columns, "images", "subjects"], rows)] if rows else []


def _calibration(comparison: Comparison) -> list[str]:
    if not comparison.calibration:
        return []
    known = real_pictures()
    rows = [
        [
            f"{column} ({comparison.columns.get(column, 'model not named')})",
            f"{value:.3f}",
            f"{known[column]:.3f}" if column in known else "–",
            f"{value - known[column]:+.3f}" if column in known else "–",
        ]
        for column, value in comparison.calibration.items()
    ]
    return [
        "## Real pictures against other real pictures of the same subject",
        _table(["column", "here", "published", "difference"], rows),
        (
            f"On DreamBench's 30 subjects both agree within {CALIBRATED_WITHIN} if models and transforms are DreamBooth's; other "
            f"pictures have nothing to agree with. Published: {published()['dreambooth']['source']}."
        ),
    ]


def _made(line: Line) -> str:
    facts = {**({line.knob + " in the tables": line.gate} if line.gate is not None else {}), **line.header}
    lines = [f"- {_cell(key)}: {_cell(_plain(value))}" for key, value in facts.items()]
    return f"### {_cell(line.label)}\n\n" + ("\n".join(lines) or "The file of scores does not say.")


def _summaries(comparison: Comparison, summaries: Summaries) -> list[str]:
    """One cell per column, then the counts, which are the same for all columns of a run."""
    counts = next(iter(summaries.values()), None)
    cells = [_summary(summaries[column]) if column in summaries else "–" for column in comparison.columns]
    return [*cells, *((str(counts.images), str(counts.subjects)) if counts else ("–", "–"))]


def _summary(summary: Summary) -> str:
    text = f"{summary.mean:.3f}"
    text += f" ± {summary.std:.3f}" if summary.std is not None else ""
    return text + (f" [{summary.low:.3f}, {summary.high:.3f}]" if summary.low is not None else "")


def _rank(rank: float | None) -> str:
    return "–" if rank is None else f"{rank:.3g}"


def _part(part: Any) -> str:
    return _number(part) if isinstance(part, float) else str(part) or "–"


def _number(gate: float) -> str:
    """0.50, but 0.525 of a refined sweep."""
    return max(f"{gate:.2f}", f"{gate:.4g}", key=len)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def to_csv(comparison: Comparison) -> str:
    """One number of a column per line: method, gate, which part of the pictures, column, model, mean and spread."""
    head = ["method", "knob", "gate", "part", "name", "column", "model", *Summary.__dataclass_fields__]
    file = io.StringIO()
    writer = csv.DictWriter(file, head, lineterminator="\n")
    writer.writeheader()
    for line in comparison.lines:
        about = {"method": line.method, "knob": line.knob, "gate": line.gate}
        parts = [("all", "", line.gate, line.scores)]
        parts += [("category", name, line.gate, summaries) for name, summaries in line.by_category.items()]
        parts += [("gate", "", gate, summaries) for gate, summaries in line.by_gate.items() if gate is not None]
        for part, name, gate, summaries in parts:
            for column, summary in summaries.items():
                where = {
                    "gate": gate,
                    "part": part,
                    "name": name,
                    "column": column,
                    "model": comparison.columns[column],
                }
                writer.writerow({**about, **where, **asdict(summary)})
        for part, rank in (("all", line.rank), ("with Table 1", line.placed)):
            if rank is not None:
                writer.writerow({**about, "part": part, "column": "mRank", "mean": rank})
    for one in comparison.differences:
        for column, found in one.scores.items():
            about = {"method": one.first, "part": "difference", "name": one.second, "column": column}
            numbers = {"mean": found.mean, "low": found.low, "high": found.high}
            writer.writerow({**about, "model": comparison.columns[column], **numbers})
    for method, rank in comparison.table_1.items():
        for column in COLUMNS:
            value = table1()[method][column]
            writer.writerow(
                {"method": method, "part": "Table 1", "column": column, "model": "not named", "mean": value}
            )
        writer.writerow({"method": method, "part": "Table 1", "column": "mRank", "mean": printed_mean_ranks()[method]})
        writer.writerow({"method": method, "part": "with Table 1", "column": "mRank", "mean": rank})
    for column, value in comparison.calibration.items():
        model = comparison.columns.get(column, "")
        writer.writerow({"method": "real pictures", "part": "all", "column": column, "model": model, "mean": value})
    return file.getvalue()


def to_json(comparison: Comparison) -> str:
    data = asdict(comparison)
    for line in data["lines"]:
        line["by_gate"] = [{"gate": gate, "scores": scores} for gate, scores in line["by_gate"].items()]
    data["table_1"] = [
        {
            "method": method,
            "mRank": rank,
            "mRank as published": printed_mean_ranks()[method],
            "scores": table1()[method],
        }
        for method, rank in comparison.table_1.items()
    ]
    data["published"] = {"source": published()["source"], "real pictures": real_pictures()}
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_tables(folder: str | Path, comparison: Comparison, name: str = "scores_table") -> tuple[Path, Path, Path]:
    """Markdown, CSV and JSON side by side in the folder."""
    texts = {".md": to_markdown, ".csv": to_csv, ".json": to_json}
    paths = [Path(folder) / f"{name}{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomically(path, text(comparison).encode())
    return tuple(paths)
