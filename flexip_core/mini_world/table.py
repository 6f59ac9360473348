"""The results of all evaluated runs as Markdown, seeds as mean ± standard deviation, and every pass line."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import gates
from .runs import BASELINE

SHOWN_GATES = (0.0, 0.3, 0.5, 0.7, 1.0)
CURVES = {
    "conflict": ("identity", "ground_text", "corner_text", "clip_t"),
    "omit": ("identity", "corner_copied", "ground_copied", "clip_i", "dino_i", "patch_i"),
}
SMOOTHNESS = ("identity", "clip_i", "dino_i")
Results = Mapping[str, Mapping[int, Any]]
"""Run -> seed -> what `runs.evaluate` gave."""


def read_results(
    folder: Path, seeds: Collection[int] | None = None
) -> tuple[dict[str, Any] | None, dict[str, dict[int, Any]]]:
    """The base's numbers and those of all runs in `folder`, or only of those with these seeds."""
    base, found = None, {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if path.stem == "base":
            base = data
        elif seeds is None or data["seed"] in seeds:
            found.setdefault(data["run"], {})[data["seed"]] = data
    return base, found


def markdown(base: Mapping[str, Any] | None, results: Results) -> str:
    parts = []
    for mode, names in CURVES.items():
        header = ["run (seeds)", "score", *(f"gate {gate:g}" for gate in SHOWN_GATES)]
        rows = [
            [f"{run} ({len(seeds)})", name, *(_spread(_at(seeds, mode, name, gate)) for gate in SHOWN_GATES)]
            for name in names
            for run, seeds in results.items()
        ]
        parts.append(
            f"Text {'names another place' if mode == 'conflict' else 'leaves the place open'} ({mode}):\n\n{_grid(header, rows)}"
        )
    parts.append(f"Evenness:\n\n{_evenness(results)}")
    parts.append("Pass lines:\n\n" + "\n".join(f"- {line}" for line in _verdicts(base, results)))
    return "\n\n".join(parts)


def cures_markdown(results: Results) -> str:
    """Cures of all seeds (cures.measured by mode): evenness of single pictures and the range that is left."""
    columns = {"largest / mean step": "per_image_feature_step", "99 %": "p99", "whole way": "whole_way"}
    columns |= {
        "identity: jump share": "identity_jump_share",
        "identity range": "identity_range",
        "corner range": "corner_copied_range",
        "DINO-I range": "dino_i_range",
    }
    parts = []
    for run, seeds in results.items():
        rows, jumps = [], []
        for mode in CURVES:
            found = [result[mode] for result in seeds.values()]
            for cure in (name for name in found[0] if name not in ("evened_gates", "between")):
                rows.append([cure, mode, *(_spread(f[cure][key] for f in found) for key in columns.values())])
            inside = [f["between"] for f in found]
            jumps.append([mode, *(_spread(f[key] for f in inside) for key in ("largest_part", "jumps"))])
        parts.append(f"Cures of single pictures' jumps, {run} ({len(seeds)} seeds):")
        parts.append(_grid(["cure", "mode", *columns], rows))
        parts.append(
            "The largest step of each picture between two gates, looked at ten times finer (even: 0.1, a jump: 1):"
        )
        parts.append(
            _grid(["mode", "share of it in its largest tenth", "pictures in which that is over half: jumps"], jumps)
        )
    return "\n\n".join(parts)


def _evenness(results: Results) -> str:
    header = ["run (seeds)", "mode", "per-image largest / mean feature step", "99 %"]
    header += [f"{name}: {what}" for name in SMOOTHNESS for what in ("Spearman", "jump share", "case jump share")]
    rows = []
    for run, seeds in results.items():
        for mode in CURVES:
            steps = [result[mode]["per_image_feature_step"] for result in seeds.values()]
            row = [f"{run} ({len(seeds)})", mode, _spread(s["mean"] for s in steps), _spread(s["p99"] for s in steps)]
            for name in SMOOTHNESS:
                found = [result[mode]["smoothness"][name] for result in seeds.values()]
                row += [_spread(f[key] for f in found) for key in ("spearman", "jump_share", "case_jump_share")]
            rows.append(row)
    return _grid(header, rows)


def _verdicts(base: Mapping[str, Any] | None, results: Results) -> list[str]:
    if base is None:
        return ["The base is not evaluated yet."]
    lines = [str(gates.base_obeys(base))]
    for run, seeds in results.items():
        if run == BASELINE or run.endswith("-swapped"):
            continue
        for seed, result in seeds.items():
            outcomes = [gates.identity_arrives(result), gates.text_kept(result), gates.continuous(result)]
            baseline, swapped = (results.get(name, {}).get(seed) for name in (BASELINE, f"{run}-swapped"))
            if baseline is not None:
                outcomes.append(gates.decoupled(result, baseline))
                if swapped is not None:
                    outcomes.append(gates.causal(result, swapped, baseline))
            lines += [f"{run}, seed {seed}: {outcome}" for outcome in sorted(outcomes, key=lambda o: o.gate)]
    return lines


def _at(seeds: Mapping[int, Any], mode: str, name: str, gate: float) -> list[float]:
    return [result[mode]["curves"][name][_nearest(result[mode]["gates"], gate)] for result in seeds.values()]


def _nearest(values: list[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda i: math.fabs(values[i] - wanted))


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.3f}"


def _grid(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
