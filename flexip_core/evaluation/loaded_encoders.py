"""The encoders that a set of columns needs, loaded, and what they say about pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..encoders import scorer_files, text_tower
from ..files.weights import name_of
from . import aesthetic, clip_iqa, metrics
from .benchmark import Subject


@dataclass(frozen=True)
class Column:
    """A kind of score by the files in certain roles."""

    kind: str  # "prompt", "identity", "quality" or "aesthetic"
    roles: tuple[str, ...]  # aesthetic: the predictor, then the CLIP that it reads
    meaning: str


class Bench:
    """The encoders that the columns need, loaded."""

    def __init__(
        self,
        wanted: Mapping[str, Column],
        files: Mapping[str, Any],
        batch: int,
        device: torch.device | str | None,
    ) -> None:
        """`wanted`: the columns by name, `files`: role -> file. `device` is CUDA by default, where there is one."""
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.wanted, self.files, self.batch = wanted, files, batch
        roles = {role for column in self.wanted.values() for role in column.roles}
        self.encoders = {
            role: metrics.ImageEncoder(self.files[role], self.device)
            for role in sorted(roles)
            if isinstance(self.files[role], scorer_files.ScorerFile)
        }
        self.quality = clip_iqa.QualityScorer(self.files["clip-rn50"], self.device) if "clip-rn50" in roles else None
        self.head = aesthetic.AestheticHead(self.files["aesthetic"]) if "aesthetic" in roles else None

    def columns(self, kind: str) -> list[tuple[str, Column]]:
        return [(name, column) for name, column in self.wanted.items() if column.kind == kind]

    def prompts(self, prompts: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Role -> prompt -> its embedding. The text towers are freed again."""
        found = {}
        for _, column in self.columns("prompt"):
            (role,) = column.roles
            file = self.files[role]
            tower = text_tower.load_text_tower(file.name, file.path, file.text, file.quick_gelu)
            found[role] = metrics.encode_prompts(tower, sorted(prompts), file.text.shape.context, self.device)
        return found

    def look(self, paths: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pictures -> role -> features (n, d), and column -> scores (n,) of those columns that need the picture alone."""
        seen: dict[str, list[Tensor]] = {role: [] for role in self.encoders}
        quality = []
        for chunk in chunks(paths, self.batch):
            pictures = [self._read(path) for path in chunk]
            for role, encoder in self.encoders.items():
                seen[role].append(encoder(pictures))
            if self.quality:
                quality.append(self.quality(pictures))
        features = {role: torch.cat(parts) for role, parts in seen.items()}
        scores = {name: torch.cat(quality) for name, _ in self.columns("quality")}
        scores |= {name: self.head(features[column.roles[1]]) for name, column in self.columns("aesthetic")}
        return features, scores

    def real(self, subject: Subject) -> dict[str, Tensor]:
        """Role -> features (r, d) of the subject's real pictures."""
        if not subject.references:
            raise ValueError(f"The subject {subject.name} has no real pictures, which CLIP-I and DINO-I compare with.")
        roles = {column.roles[0] for _, column in self.columns("identity")}
        seen: dict[str, list[Tensor]] = {role: [] for role in roles}
        for chunk in chunks(subject.references, self.batch):
            pictures = [metrics.read_picture(path) for path in chunk]
            for role in roles:
                seen[role].append(self.encoders[role](pictures))
        return {role: torch.cat(parts) for role, parts in seen.items()}

    def _read(self, path: Path) -> Image.Image:
        picture = metrics.read_picture(path)
        if self.quality and min(picture.size) < clip_iqa.SMALLEST:
            raise ValueError(
                f"The picture {name_of(path)} has {picture.width} x {picture.height} pixels, too few for CLIP-IQA, "
                f"which needs {clip_iqa.SMALLEST} on each side; measure without that column."
            )
        return picture


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    if size < 1:
        raise ValueError(f"The batch must be at least 1 picture, got {size}.")
    return (items[start : start + size] for start in range(0, len(items), size))


def float32():
    """cuDNN would run convolutions of float32 with 10 bits of mantissa, which is seen in the third decimal."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
