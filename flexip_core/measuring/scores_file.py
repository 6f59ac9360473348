"""The file that `score` writes and that tables, figures and gate measures read: one row per picture.

scores.json            {"format": 1, "method", "header", "columns", "missing", "rows"}
scores.safetensors     "dino": (rows, d), the pictures' DINO features in the order of the rows; only where DINO-I was measured
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.parse import Unreadable, read_json
from ..files.weights import read_tensors, write_atomically

FORMAT = 1
FEATURES = "dino"


@dataclass(frozen=True)
class Row:
    """One picture. `case` names the prompt of its subject, `image` its number among the pictures of that prompt."""

    subject: str
    category: str
    case: str
    image: int
    gate: float | None  # None: the method has no gate, or it was not swept
    scores: Mapping[str, float]  # column -> score; CLIP-T, CLIP-I, DINO-I, ... in the units of the column


@dataclass(frozen=True)
class Scores:
    method: str
    header: Mapping[str, Any]  # what makes the run reproducible: commit, hashes, sampler, steps, cfg, seeds, gate
    columns: Mapping[str, str]  # column -> the model and the transform behind it, for table headers
    missing: Mapping[str, str]  # column -> the sentence that says why there is none
    rows: tuple[Row, ...]
    features: Tensor | None = field(default=None, compare=False)  # (rows, d)

    @property
    def gates(self) -> tuple[float, ...]:
        return tuple(sorted({row.gate for row in self.rows if row.gate is not None}))

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(sorted({row.subject for row in self.rows}))


def write(path: Path, scores: Scores) -> None:
    """`path` is the .json; the features go beside it."""
    from safetensors.torch import save

    data = {"format": FORMAT, **{f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}}
    del data["features"]
    data["rows"] = [dataclasses.asdict(row) for row in scores.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    if scores.features is not None:
        if len(scores.features) != len(scores.rows):
            raise ValueError(f"{path.name}: {len(scores.features)} features for {len(scores.rows)} pictures.")
        write_atomically(_features_file(path), save({FEATURES: scores.features.float().contiguous()}))
    write_atomically(path, json.dumps(data, indent=1).encode())


def read(path: Path) -> Scores:
    """ValueError, one sentence with the file's name, if it is not such a file."""
    try:
        data = read_json(path)
        if data["format"] != FORMAT:
            raise ValueError(f"{path} has the format {data['format']}, and this version reads {FORMAT}; score again.")
        rows = tuple(Row(**row) for row in data["rows"])
        parts = {name: data[name] for name in ("method", "header", "columns", "missing")}
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}; make one with the command score.") from None
    except (KeyError, TypeError, Unreadable) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a file of scores ({reason}); make one with the command score.") from None
    features = _features_file(path)
    tensors = read_tensors(features)[FEATURES] if features.is_file() else None
    if tensors is not None and len(tensors) != len(rows):
        raise ValueError(f"{features} belongs to another run than {path.name}; score again.")
    return Scores(**parts, rows=rows, features=tensors)


def _features_file(path: Path) -> Path:
    return path.with_suffix(".safetensors")
