"""FlexIPScore: how close pictures are to the reference and to the prompt."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sd1_clip
import torch
from comfy_api.v0_0_2 import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..flexip_core.encoders import text_tower
from ..flexip_core.measuring import scores
from ..flexip_core.measuring.scores import CLIP_I, CLIP_T, DINO_I, Score
from ..flexip_core.run.schedule import parse_numbers
from . import files, notices, sampler, scorers
from .compat import KEEP_PREVIEW
from .errors import named
from .load import LoadedAdapters
from .types import CHECK_MENU, FlexIPAdapters

NODE = "FlexIPScore"


class FlexIPScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = [files.AUTO, scorers.NONE, *files.names(files.ENCODER_FOLDER)]
        return io.Schema(
            node_id=NODE,
            display_name="FlexIP Score",
            category=CHECK_MENU,
            description="Scores every picture of a batch: CLIP-I and DINO-I (how close it is to the reference), CLIP-T (how close it is to the prompt). With the gates of a sweep it plots them over the gate.",
            search_aliases=["clip score", "clip-i", "clip-t", "dino score", "evaluate", "metrics", "similarity"],
            is_output_node=True,
            **KEEP_PREVIEW,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to score, as one batch."),
                io.Image.Input(
                    "reference_image",
                    tooltip="The reference picture. A batch is one subject seen several times: every view counts equally.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the pictures should show, for CLIP-T. Weights such as (red:1.2) are read as plain words. Empty: no CLIP-T.",
                ),
                io.Combo.Input(
                    "clip_vision",
                    options=choices,
                    default=files.AUTO,
                    optional=True,
                    tooltip="CLIP in models/clip_vision for CLIP-I, and for CLIP-T if the file has its text tower. auto: OpenAI's ViT-B/32, which published scores are made with, else the largest that works.",
                ),
                io.Combo.Input(
                    "dino",
                    options=choices,
                    default=files.AUTO,
                    optional=True,
                    tooltip="DINO or DINOv2 in models/clip_vision for DINO-I. auto: DINO v1 ViT-S/16, which published scores are made with, else the largest that works.",
                ),
                FlexIPAdapters.Input(
                    "adapters",
                    optional=True,
                    tooltip="The adapters that made the pictures: scores from an encoder that these adapters read themselves are marked.",
                ),
                io.String.Input(
                    "gates",
                    default="",
                    optional=True,
                    tooltip="The gates of a sweep, as on FlexIP Sampler, such as 0, 0.5, 1: scores are averaged per gate and plotted over it. The images must be in the same order. Empty: every image by itself.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="All scores in words, with the encoders that made them and what they can be compared with.",
                ),
                io.Float.Output(
                    "clip_i", display_name="CLIP-I", is_output_list=True, tooltip="One CLIP-I per image, as a list."
                ),
                io.Float.Output(
                    "dino_i", display_name="DINO-I", is_output_list=True, tooltip="One DINO-I per image, as a list."
                ),
                io.Float.Output(
                    "clip_t", display_name="CLIP-T", is_output_list=True, tooltip="One CLIP-T per image, as a list."
                ),
                io.Image.Output(
                    "plot", display_name="plot", tooltip="The scores over the gate, or over the image's number."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, clip_vision: str | None = files.AUTO, dino: str | None = files.AUTO) -> bool | str:
        return scorers.check_choices(NODE, clip_vision, dino)

    @classmethod
    def fingerprint_inputs(cls, clip_vision: str = files.AUTO, dino: str = files.AUTO, **_: Any) -> list:
        return scorers.fingerprint(clip_vision, dino)

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        reference_image: torch.Tensor,
        prompt: str = "",
        clip_vision: str = files.AUTO,
        dino: str = files.AUTO,
        adapters: LoadedAdapters | None = None,
        gates: str = "",
    ) -> io.NodeOutput:
        scorers.check_pictures(images, "images", NODE)
        scorers.check_pictures(reference_image, "reference_image", NODE)
        values = read_gates(gates, len(images))
        needs = adapters.network.needs() if adapters is not None else ()
        clip_i, clip_t = clip_scores(images, reference_image, plain(prompt), clip_vision, needs)
        found = (clip_i, dino_score(images, reference_image, dino, needs), clip_t)
        report, plot = scores.report(found, values), scores.plot(found, values)
        logging.info("FlexIP Score\n%s", report)
        shown = notices.said(report)
        if plot is None:
            plot = ExecutionBlocker(f"{NODE}: no score is available, so there is no plot; the report says why.")
        else:
            shown |= ui.PreviewImage(plot, cls=cls).as_dict()
        return io.NodeOutput(report, *map(output, found), plot, ui=shown)


def clip_scores(
    images: torch.Tensor, reference: torch.Tensor, prompt: str, choice: str, needs: tuple
) -> tuple[Score, Score]:
    """CLIP-I and CLIP-T, by one file; the pictures are encoded once for both."""
    try:
        scorer = scorers.ImageScorer(scorers.find("clip_vision", choice, NODE))
    except ValueError as error:
        return scores.missing(CLIP_I, str(error)), scores.missing(CLIP_T, str(error))
    file, own = scorer.file, scorer.file.is_read_by(needs)
    features = scorer.features(images)
    nearness = scores.image_scores(features, scorer.features(reference))
    clip_i = Score(CLIP_I, tuple(nearness.tolist()), file.label, file.note(CLIP_I, own))
    if not prompt:
        return clip_i, scores.missing(CLIP_T, "there is no prompt; type it into prompt, or wire it there.")
    if file.text is None:
        return clip_i, scores.missing(CLIP_T, file.no_text)
    try:
        match = scores.cosine(features, scorers.text_features(file, prompt))[:, 0]
    except ValueError as error:
        return clip_i, scores.missing(CLIP_T, str(error))
    note, count, context = file.note(CLIP_T, own), text_tower.count_tokens(prompt), file.text.shape.context
    if count > context:
        note += f" CLIP read only the first {context} of the prompt's {count} tokens."
    return clip_i, Score(CLIP_T, tuple(match.tolist()), file.label, note)


def dino_score(images: torch.Tensor, reference: torch.Tensor, choice: str, needs: tuple) -> Score:
    try:
        scorer = scorers.IdentityScorer(DINO_I, scorers.ImageScorer(scorers.find("dino", choice, NODE)), needs)
    except ValueError as error:
        return scores.missing(DINO_I, str(error))
    values, _ = scorer.score(images, reference)
    return Score(DINO_I, values, scorer.scorer.file.label, scorer.note)


def plain(prompt: str) -> str:
    """The prompt without ComfyUI's weights, which CLIP's own text tower would read as words: "(red:1.2) cat" -> "red cat"."""
    parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(prompt), 1.0)
    return comfy.sd1_clip.unescape_important("".join(text for text, _ in parts)).strip()


def read_gates(text: str, images: int) -> tuple[float, ...]:
    """The gates of the sweep, as FlexIPSampler reads them; the images must divide evenly among them."""
    with named(NODE):
        gates = parse_numbers(text, 0.0, 1.0, "gates", sampler.MOST)
        if gates:
            scores.by_gate(range(images), gates)
    return gates


def output(score: Score) -> list[float] | ExecutionBlocker:
    return list(score.values) if score.available else ExecutionBlocker(f"{NODE}: {score.name} {score.unavailable}")
