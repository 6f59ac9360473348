"""How far real training has come: a few pictures at three gates on fixed seeds, scored, and shown in the run's folder.

The scores are made with encoders that training itself uses, so they tell how a run is going, not how good it is compared with others
(for that: flexip_core.evaluation, with encoders of its own).

    identity_G  cosine of DINO's [CLS] with the reference's: the subject
    copied_G    mean cosine of DINO's patch tokens at the same places: picture and layout
    text_G      cosine of the caption and the picture in CLIP; only if the CLIP file has a text tower
    score       identity_1 + text_0; without a text tower identity_1 - copied_0, which rewards that gate 0 does not copy

Shape legend: n cases, h x w pixels.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..encoders.scorer_files import clip_scorer
from ..encoders.text_tower import TextTower, load_text_tower, tokenize
from ..files.weights import name_of, write_atomically
from ..network.adapters import ADAPTERS, FlexIPNetwork
from ..pictures.contact_sheet import contact_sheet
from .data import INVARIANT, VARIANT, PairSource
from .sampling import draw
from .sd_configs import LATENT_CHANNELS, SIDE

GATES = (0.0, 0.5, 1.0)
PREVIEWS = "previews"
SEED = 4242


@dataclass(frozen=True)
class Cases:
    """What is drawn, always the same: references (n, 3, h, w) in -1..1, the captions, noise (n, c, h / 8, w / 8)."""

    references: Tensor
    captions: list[tuple[str, ...]]
    noise: Tensor


def choose_cases(source: PairSource, count: int) -> Cases:
    """Reference and caption of pairs from `source`; of two pictures of one subject, if there are any."""
    g = torch.Generator().manual_seed(SEED)
    batch = source.batch(torch.full((count,), VARIANT if source.views() else INVARIANT), g)
    height, width = (side // SIDE for side in batch.targets.shape[2:])
    noise = torch.randn(count, LATENT_CHANNELS, height, width, generator=g)
    return Cases(batch.references, list(batch.captions), noise)


class PictureProbe:
    """The Probe of a real base (`base`: an SDBase)."""

    def __init__(
        self,
        base: Any,
        cases: Cases,
        clip_file: str | Path,
        folder: str | Path | None = None,
        adapters: Sequence[str] = ADAPTERS,
        steps: int = 20,
        cfg: float = 7.0,
        release: bool = False,
    ):
        """`folder`: of the run, for the pictures. `release`: the base's encoders leave the memory after every use."""
        self.base, self.cases, self.folder, self.adapters = base, cases, folder, tuple(adapters)
        self.steps, self.cfg, self.release = steps, cfg, release
        self.text_file, why = _text_file(clip_file)
        if why:
            logging.info("The probe scores without text: %s", why)

    @torch.no_grad()
    def __call__(self, network: FlexIPNetwork, step: int) -> dict[str, float]:
        base, cases = self.base, self.cases
        features = base.features(cases.references)
        drawn = [self._draw(network, features, gate) for gate in GATES]
        seen = base.seen(cases.references)
        scores: dict[str, Tensor] = {}
        texts = self._texts()
        for gate, pictures in zip(GATES, drawn):
            found = base.seen(pictures)
            scores[f"identity_{gate:g}"] = F.cosine_similarity(found["dino"], seen["dino"]).mean()
            scores[f"copied_{gate:g}"] = F.cosine_similarity(found["patches"], seen["patches"], dim=-1).mean()
            if texts is not None:
                scores[f"text_{gate:g}"] = F.cosine_similarity(found["cls"], texts).mean()
        result = {name: value.item() for name, value in scores.items()}
        second = result["text_0"] if texts is not None else -result["copied_0"]
        if self.folder is not None:
            save_preview(Path(self.folder) / PREVIEWS / f"step_{step:06d}.png", cases.references, drawn)
        if self.release:
            base.release()
        return {"score": result["identity_1"] + second, **result}

    def _draw(self, network: FlexIPNetwork, features: dict[str, Tensor], gate: float) -> Tensor:
        """One by one, so that a probe needs less memory than a training step."""
        cases, rows = self.cases, []
        for i in range(len(cases.captions)):
            one = slice(i, i + 1)
            its = {name: value[one] for name, value in features.items()}
            rows.append(
                draw(
                    self.base,
                    cases.captions[one],
                    cases.noise[one],
                    network,
                    its,
                    gate,
                    self.adapters,
                    self.steps,
                    self.cfg,
                )
            )
        return torch.cat(rows)

    def _texts(self) -> Tensor | None:
        """(n, embedding) of the captions; the text tower is in memory only for this."""
        if self.text_file is None:
            return None
        scorer = self.text_file
        tower: TextTower = load_text_tower(scorer.name, scorer.path, scorer.text, scorer.quick_gelu)
        tokens = tokenize([", ".join(caption) for caption in self.cases.captions], scorer.text.shape.context)
        return tower(tokens).to(self.base.device)


def _text_file(clip_file: str | Path) -> tuple[Any, str]:
    """The CLIP file as a scorer, or None and why its text tower cannot be used."""
    try:
        scorer = clip_scorer(name_of(clip_file), clip_file)
    except ValueError as error:
        return None, str(error)
    return (scorer, "") if scorer.text is not None else (None, scorer.no_text)


def save_preview(path: Path, references: Tensor, drawn: Sequence[Tensor]) -> None:
    """A row per case: the reference, and the pictures at each gate."""
    columns = torch.cat([references.to(drawn[0].device), *drawn])
    labels = ["reference", *(f"gate {gate:g}" for gate in GATES)]
    sheet = contact_sheet((columns.movedim(1, -1) + 1) / 2, labels)[0]
    buffer = io.BytesIO()
    Image.fromarray((sheet * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
