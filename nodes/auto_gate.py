"""FlexIPAutoGate: keep at least this much identity."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import comfy.samplers
import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui

from ..flexip_core.measuring import auto_gate
from ..flexip_core.measuring.auto_gate import Found
from ..flexip_core.pictures.plots import Series, line_plot
from . import files, notices, runtime, scorers
from .checks import check_finite, check_latent, check_numbers
from .compat import KEEP_PREVIEW
from .sampler import decode, sample
from .types import CONTROL_MENU

NODE = "FlexIPAutoGate"
SCORE, SHARE = "score", "share of the range"


class FlexIPAutoGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        vision = files.names(files.ENCODER_FOLDER)
        return io.Schema(
            node_id=NODE,
            display_name="FlexIP Auto Gate",
            category=CONTROL_MENU,
            description="Keep at least this much identity: finds the smallest gate whose identity score reaches the target, with a few short runs, and shows the curve it found.",
            search_aliases=["auto gate", "identity target", "find gate", "likeness", "auto weight"],
            is_output_node=False,
            **KEEP_PREVIEW,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model with a FlexIP gate; this node finds the gate for the last Apply FlexIP Gate.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="As on your sampler; only its first latent is used. A smaller one is faster.",
                ),
                io.Vae.Input("vae", tooltip="Decodes the short runs, because they are scored as pictures."),
                io.Image.Input(
                    "reference_image", tooltip="The subject, as in Encode Reference; several views are averaged."
                ),
                io.Float.Input(
                    "target",
                    default=0.6,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much identity to keep. As a score: a cosine of DINO-I, or of CLIP-I where there is no DINO. As a share of the range: 0 is what gate 0 gives, 1 the best that any gate gives.",
                ),
                io.Combo.Input(
                    "target_is",
                    options=[SHARE, SCORE],
                    default=SHARE,
                    tooltip="What the target is measured in. Scores differ a lot between encoders; the share of the range does not.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,  # another seed would be another search
                    tooltip="Seed of the first noise; each further noise uses the next seed.",
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=100,
                    tooltip="Steps of the short runs. More steps are slower and more reliable.",
                ),
                io.Int.Input(
                    "noises",
                    default=2,
                    min=1,
                    max=16,
                    tooltip="How many noises to try each gate with. Their spread is the uncertainty that is shown.",
                ),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="As on your sampler."
                ),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As on your sampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As on your sampler."),
                io.Combo.Input(
                    "clip_vision",
                    options=[files.AUTO, scorers.NONE, *vision],
                    default=files.AUTO,
                    advanced=True,
                    tooltip="CLIP file to score with where there is no DINO. auto: the file in models/clip_vision that fits best.",
                ),
                io.Combo.Input(
                    "dino",
                    options=[files.AUTO, scorers.NONE, *vision],
                    default=files.AUTO,
                    advanced=True,
                    tooltip="DINO file to score with. auto: the file in models/clip_vision that fits best.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="The model with the gate that was found, for any sampler."
                ),
                io.Float.Output("gate", display_name="gate", tooltip="The gate that was found."),
                io.Image.Output(
                    "plot", display_name="plot", tooltip="Score against gate, with the spread over the noises."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What was found, how sure it is, and by which encoder."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, clip_vision: str | None = files.AUTO, dino: str | None = files.AUTO) -> bool | str:
        return scorers.check_choices(NODE, clip_vision, dino)

    @classmethod
    def fingerprint_inputs(cls, clip_vision: str | None = files.AUTO, dino: str | None = files.AUTO, **_: Any) -> list:
        return scorers.fingerprint(clip_vision, dino)

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict,
        vae: Any,
        reference_image: torch.Tensor,
        target: float,
        target_is: str,
        seed: int,
        steps: int,
        noises: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        clip_vision: str,
        dino: str,
    ) -> io.NodeOutput:
        links = runtime.gated_links(model, NODE)
        if links[-1].silent:
            raise ValueError(
                f"{NODE}: the last Apply FlexIP Gate has strength 0, so no gate changes anything. Raise its strength."
            )
        check_latent(NODE, "latent_image", latent_image, model)
        check_finite(NODE, target=target)  # a target out of reach gets a message of its own
        check_numbers(NODE, 0, 100, cfg=cfg)
        scorers.check_pictures(reference_image, "reference_image", NODE)
        scorer = scorers.identity_scorer(clip_vision, dino, NODE, links[-1].network.needs())
        latent = first_of(latent_image)

        def measure(gates: tuple[float, ...]) -> np.ndarray:
            """(noises, gates)"""
            rows = []
            gated = with_gates(model, gates)
            for number in range(noises):
                result = sample(
                    gated,
                    (seed + number) % 2**64,
                    steps,
                    cfg,
                    sampler_name,
                    scheduler,
                    positive,
                    negative,
                    latent,
                    1.0,
                    len(gates),
                )
                rows.append(scorer.score(decode(vae, result["samples"]), reference_image)[0])
            return np.array(rows)

        gates, scores = auto_gate.FIRST_ROUND, measure(auto_gate.FIRST_ROUND)
        wanted = target if target_is == SCORE else auto_gate.as_score(target, scores)
        finer = auto_gate.second_round(gates, scores, wanted)
        if finer:
            order = np.argsort((*gates, *finer))
            scores = np.concatenate([scores, measure(finer)], axis=1)[:, order]
            gates = tuple(np.array((*gates, *finer))[order].tolist())
        found = auto_gate.find_gate(gates, scores, wanted)
        report = in_words(found, gates, scores, wanted, steps, scorer)
        logging.info("FlexIP Auto Gate\n%s", report)
        plot = curve(found, gates, scores, wanted, scorer.name)
        shown = notices.said(report) | ui.PreviewImage(plot, cls=cls).as_dict()
        return io.NodeOutput(with_gates(model, (found.gate,)), found.gate, plot, report, ui=shown)


def first_of(latent: dict) -> dict:
    """Its first latent, with that one's mask and noise."""
    first = {**latent, "samples": latent["samples"][:1]}
    if "batch_index" in latent:
        first["batch_index"] = latent["batch_index"][:1]
    if "noise_mask" in latent:
        mask = latent["noise_mask"]
        first["noise_mask"] = mask.reshape(-1, 1, *mask.shape[-2:])[:1]
    return first


def with_gates(model: Any, gates: tuple[float, ...]) -> Any:
    """The model with these gates in place of the last link's."""
    links = runtime.links_of(model)
    return runtime.with_links(model, (*links[:-1], dataclasses.replace(links[-1], gates=gates, over_prompts=True)))


def in_words(
    found: Found,
    gates: tuple[float, ...],
    scores: np.ndarray,
    wanted: float,
    steps: int,
    scorer: scorers.IdentityScorer,
) -> str:
    noises, mean = len(scores), scores.mean(axis=0)
    range_text = f"measured {mean.min():.3f} to {mean.max():.3f}"
    if not found.reached:
        advice = "use gate 1.00: no gate reaches the target, and this one comes as close as these adapters can"
        first = f"no gate reaches {wanted:.3f} ({range_text}); gate 1 is taken, which keeps the most that these adapters can"
    elif found.gate <= gates[0]:
        advice = "use gate 0.00: every gate reaches the target"
        first = f"gate 0: every gate reaches {wanted:.3f} ({range_text})"
    else:
        reaching = sum(bool(np.interp(found.gate, gates, row) >= wanted - 1e-6) for row in scores)
        advice = f"use gate {found.gate:.2f}: there {reaching} of {noises} tries reached your target"
        first = f"gate {found.gate:.2f} reaches {wanted:.3f} ({range_text})"
    lines = [advice, first]
    if found.reached and noises > 1:
        lines.append(
            f"individual noises reach it between {found.lowest:.2f} and {found.highest:.2f}"
            + (f"; {found.never} of {noises} never do" if found.never else "")
        )
    elif noises == 1:
        lines.append("only one noise was tried, so there is no estimate of how sure this is")
    falls = float(np.max(np.maximum.accumulate(mean) - mean))
    if falls > 0.1 * float(mean.max() - mean.min()) > 0:
        lines.append("the curve does not rise all the way, so a higher gate may score lower")
    lines.append(
        f"{scores.size} pictures of {steps} steps ({noises} noises, {len(gates)} gates); between gates {found.step:.2g} apart it is a straight line; full runs may score differently"
    )
    lines.append(f"by {scorer.label}" + (f" ({scorer.note})" if scorer.note else ""))
    return notices.sentences(lines)


def curve(found: Found, gates: tuple[float, ...], scores: np.ndarray, wanted: float, name: str) -> torch.Tensor:
    spread = list(zip(scores.min(axis=0).tolist(), scores.max(axis=0).tolist()))
    series = [
        Series(name, gates, scores.mean(axis=0).tolist(), spread if len(scores) > 1 else None, points=True),
        Series("target", (0.0, 1.0), (wanted, wanted)),
    ]
    return line_plot(series, "gate", name, x_range=(0.0, 1.0), marks=[(found.gate, f"{found.gate:.2f}")])
