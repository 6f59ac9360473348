"""What papers print (published.json, with its sources) and mRank, the number by which FlexIP's Table 1 orders methods."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

COLUMNS = ("CLIP-T", "CLIP-I", "DINO-I", "CLIP-IQA", "Aesthetic")  # of Table 1; the higher, the better
DIGITS = 3  # to which the papers print scores


@cache
def published() -> Mapping[str, Any]:
    return json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


def table1() -> dict[str, dict[str, float]]:
    """Method -> column -> score, the five automatic columns of the paper's nine rows."""
    return {row["method"]: {column: row[column] for column in COLUMNS} for row in published()["table_1"]["rows"]}


def printed_mean_ranks() -> dict[str, float]:
    """Method -> mRank as the paper prints it."""
    return {row["method"]: row["mRank"] for row in published()["table_1"]["rows"]}


NOT_COMPARABLE = "NOT comparable"  # in the name of a column's model that the published scores were not made with


def comparable(columns: Mapping[str, str], names: Sequence[str] = COLUMNS) -> tuple[str, ...]:
    """Those of `names` that `columns` (column -> model) has from a model that compares with published scores."""
    return tuple(name for name in names if name in columns and NOT_COMPARABLE not in columns[name])


def real_pictures() -> dict[str, float]:
    """DreamBooth's row of real pictures against real pictures of the same subject: column -> mean cosine."""
    real = next(row for row in published()["dreambooth"]["rows"] if row["method"] == "real pictures")
    return {column: real[column] for column in ("DINO-I", "CLIP-I")}


def mean_ranks(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str] = COLUMNS) -> dict[str, float]:
    """mRank(m) = mean over the columns of m's rank among all rows; 1 is the highest score. It only means something
    together with the set of rows.

    Scores are ranked as they are printed, to 3 digits, so that a reader can recompute every rank from the table. Equal
    scores share the better rank. That gives eight of the paper's nine mRanks exactly; ELITE, whose Aesthetic score ties
    with MoMA's, gets 6.0 instead of 6.2, because the paper ranked unrounded scores.
    """
    if not columns:
        raise ValueError("mRank needs at least one column that all methods have.")
    for method, scores in rows.items():
        absent = [column for column in columns if not math.isfinite(scores.get(column, math.nan))]
        if absent:
            raise ValueError(f"{method} has no score for {', '.join(absent)}; rank it over the other columns.")
    ranks = {
        column: _ranks({method: round(scores[column], DIGITS) for method, scores in rows.items()}) for column in columns
    }
    return {method: sum(ranks[column][method] for column in columns) / len(columns) for method in rows}


def inserted(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str] = COLUMNS) -> dict[str, float]:
    """mRanks of the paper's nine rows and these, all ranked together. Every row that is added shifts the published ones."""
    table = {method: {column: scores[column] for column in columns} for method, scores in table1().items()}
    twice = sorted(set(table) & set(rows))
    if twice:
        raise ValueError(f"{', '.join(twice)} is in the published table already; give the new row another name.")
    return mean_ranks({**table, **rows}, columns)


def _ranks(scores: Mapping[str, float]) -> dict[str, int]:
    return {method: 1 + sum(other > score for other in scores.values()) for method, score in scores.items()}
