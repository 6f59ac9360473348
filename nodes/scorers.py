"""Encoders that score pictures: found by content in models/clip_vision, run under ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.model_management as mm
import torch

from ..flexip_core.encoders import scorer_files, text_tower
from ..flexip_core.encoders.scorer_files import ScorerFile
from ..flexip_core.files.stored import first_parts
from ..flexip_core.measuring import scores
from ..flexip_core.pictures.crop import finite
from . import encoders, files

NONE = "none"
CHUNK = 8  # pictures per forward pass: bounds the memory of a long batch
_MAKERS = {"clip_vision": scorer_files.clip_scorer, "dino": scorer_files.dino_scorer}
_WANTED = {
    "clip_vision": f"a whole CLIP image encoder; put {scorer_files.CLIP_STANDARD} there ({scorer_files.CLIP_ADVICE})",
    "dino": f"a DINO or DINOv2 image encoder; put {scorer_files.DINO_STANDARD} there ({scorer_files.DINO_ADVICE})",
}


def find(role: str, choice: str, node: str) -> ScorerFile:
    """The scorer for "clip_vision" or "dino": the chosen file, or with "auto" the best one. ValueError, a sentence, if there is none."""
    make = _MAKERS[role]
    if choice == NONE:
        raise ValueError(f"{role} is set to {NONE}; choose a file or {files.AUTO}.")
    if choice != files.AUTO:
        scorer = make(choice, files.path_of(files.ENCODER_FOLDER, choice, node))
        scorer_files.check(scorer)
        return scorer
    found = []
    for name in first_parts(files.names(files.ENCODER_FOLDER)):
        try:
            found.append(make(name, files.path_of(files.ENCODER_FOLDER, name, node)))
        except ValueError:
            continue  # who chooses the file by its name is told what is wrong with it
    for scorer in scorer_files.by_preference(found):
        try:
            scorer_files.check(scorer)
        except ValueError:
            continue
        return scorer
    looked = ", ".join(files.names(files.ENCODER_FOLDER)) or "no files at all"
    raise ValueError(f"no file in {files.searched(files.ENCODER_FOLDER)} is {_WANTED[role]}. Looked at: {looked}.")


def check_choices(node: str, clip_vision: str | None, dino: str | None) -> bool | str:
    """For validate_inputs of a node with these two inputs."""
    options = [files.AUTO, NONE, *files.names(files.ENCODER_FOLDER)]
    choices = {"clip_vision": clip_vision, "dino": dino}
    return files.check_choices(node, dict.fromkeys(choices, options), choices)


def fingerprint(clip_vision: str | None, dino: str | None) -> list:
    """For ComfyUI's cache: a file that was added to the folder, or changed, means new scores; only the folder counts, whatever is chosen."""
    return [] if clip_vision == dino == NONE else files.state_of(files.ENCODER_FOLDER)


class ImageScorer:
    """The image tower of a scorer file. It lives as long as this object; ComfyUI moves it to the GPU and back."""

    def __init__(self, file: ScorerFile):
        self.file = file
        self.patcher = encoders.wrap(scorer_files.load_image_tower(file))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (b, h, w, c) in 0..1 -> what is compared (b, d), float32 on the CPU."""
        size = self.file.crop
        memory = (
            min(len(pictures), CHUNK) * size * size * 4096
        )  # generously: a ViT-H holds 120 MB per picture of 224 px
        mm.load_models_gpu([self.patcher], memory_required=memory, force_full_load=True)
        found = []
        with torch.no_grad():
            for chunk in pictures.split(CHUNK):
                mm.throw_exception_if_processing_interrupted()
                pixels = scorer_files.prepare(self.file, chunk)
                found.append(scorer_files.embed(self.patcher.model, pixels).float().cpu())
        return torch.cat(found)


def text_features(file: ScorerFile, prompt: str) -> torch.Tensor:
    """The prompt's embedding (1, d) by the text tower of a CLIP file, float32 on the CPU."""
    assert file.text is not None  # the node asks `no_text` before
    tower = text_tower.load_text_tower(file.name, file.path, file.text, file.quick_gelu)
    patcher = encoders.wrap(tower)
    mm.load_models_gpu([patcher], force_full_load=True)
    with torch.no_grad():
        return patcher.model(text_tower.tokenize([prompt], file.text.shape.context)).float().cpu()


class IdentityScorer:
    """One identity score, for many calls with the same reference: the tower stays loaded, and the reference is encoded once."""

    def __init__(self, name: str, scorer: ImageScorer, needs: Iterable = ()):
        self.name = name
        self.scorer = scorer
        self.label = f"{name} by {scorer.file.label}"
        self.note = scorer.file.note(name, scorer.file.is_read_by(needs))
        self._reference: tuple[Any, Any] = (None, None)  # pictures, features

    def score(self, images: torch.Tensor, reference_image: torch.Tensor) -> tuple[tuple[float, ...], str]:
        """Pictures (b, h, w, c) -> the score of each, and by what."""
        if self._reference[0] is not reference_image:
            self._reference = (reference_image, self.scorer.features(reference_image))
        values = scores.image_scores(self.scorer.features(images), self._reference[1])
        return tuple(values.tolist()), self.label


def identity_scorer(clip_vision: str, dino: str, node: str, needs: Iterable = ()) -> IdentityScorer:
    """DINO-I, or CLIP-I where there is no DINO; `needs` are what the adapters read. ValueError, a sentence, without either."""
    reasons = []
    for name, role, choice in ((scores.DINO_I, "dino", dino), (scores.CLIP_I, "clip_vision", clip_vision)):
        try:
            return IdentityScorer(name, ImageScorer(find(role, choice, node)), needs)
        except ValueError as error:
            reasons.append(f"{name} is not available: {error}")
    raise ValueError(f"{node}: there is nothing to measure identity with. {' '.join(reasons)}")


def check_pictures(pictures: Any, name: str, node: str) -> None:
    """ValueError, naming the input `name`, unless this is a ComfyUI IMAGE with at least one whole picture."""
    shape = tuple(getattr(pictures, "shape", ()))
    if len(shape) != 4 or shape[3] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"{node}: {name} has the shape {shape} instead of pictures x height x width x 1, 3 or 4 channels; "
            f"connect at least one image to {name}."
        )
    if not pictures.is_floating_point():
        raise ValueError(
            f"{node}: {name} holds whole numbers instead of decimals from 0 to 1; connect an image as ComfyUI's nodes make it."
        )
    for number, picture in enumerate(pictures):
        if not finite(picture):
            raise ValueError(
                f"{node}: picture {number + 1} of {name} contains values that are not numbers (NaN or infinite); "
                "the node that made it failed, so use another picture."
            )
