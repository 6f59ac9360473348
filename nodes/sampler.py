"""FlexIPSampler: KSampler with a sweep of gates from the same noise."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import comfy.k_diffusion.sampling as k_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.v0_0_2 import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..flexip_core.pictures.contact_sheet import contact_sheet
from ..flexip_core.run.chain import Link
from ..flexip_core.run.schedule import GateBatch, GateCurve, parse_numbers
from . import notices, runtime
from .checks import check_latent, check_numbers
from .compat import KEEP_PREVIEW, with_channels_of
from .errors import named
from .notices import Report
from .types import START_MENU

NODE = "FlexIPSampler"
MOST = 64  # pictures of one sweep
NO_GATE = "sampled without a reference: the model has no FlexIP gate, so gates and strengths were not used"


class FlexIPSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="FlexIP Sampler",
            category=START_MENU,
            description="KSampler for a gated model. With a list of gates it samples every gate from the same noise and lays the pictures side by side.",
            **KEEP_PREVIEW,
            search_aliases=["ksampler", "gate sweep", "xy plot", "ip-adapter sampler"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model with a FlexIP gate. Without one (for example with Apply FlexIP Gate bypassed) it is sampled as it is.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise; every gate gets the same noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Number of sampling steps."),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strictly the image follows the prompt and the reference.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The sampling algorithm."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How the noise is removed over the steps.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should show; gets the reference."),
                io.Conditioning.Input("negative", tooltip="What it should not show; gets an empty (null) reference."),
                io.Latent.Input(
                    "latent_image", tooltip="The latent to denoise; a whole batch is sampled for every gate."
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 keeps part of the latent image.",
                ),
                io.String.Input(
                    "gates",
                    default="",
                    tooltip="Gates to compare, such as 0, 0.25, 0.5, 0.75, 1. They replace the gate of the last Apply FlexIP Gate. Empty: that node's own gate.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Wire it to get the labelled contact sheet."),
                io.String.Input(
                    "strengths",
                    default="",
                    optional=True,
                    tooltip="Strengths to compare, such as 0.5, 1: a row of the contact sheet each. They replace the strength of the last Apply FlexIP Gate.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="All in one batch: first all latents with the first gate, then with the second, ...; with strengths, all gates for the first strength, then for the second, ...",
                ),
                io.Image.Output(
                    "contact_sheet",
                    display_name="contact sheet",
                    tooltip="One column per gate, one row per strength; needs the vae.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What FlexIP did in this run: files, encoders, tokens, blocks, steps, gates, seconds.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: dict,
        denoise: float,
        gates: str,
        vae: Any = None,
        strengths: str = "",
    ) -> io.NodeOutput:
        links = runtime.links_of(model)  # none: Apply FlexIP Gate is bypassed
        check_latent(NODE, "latent_image", latent_image, model)
        check_numbers(NODE, 0, 100, cfg=cfg)
        check_numbers(NODE, 0, 1, denoise=denoise)
        with named(NODE):
            values = parse_numbers(gates, 0.0, 1.0, "gates", MOST)
            amounts = parse_numbers(strengths, 0.0, 5.0, "strengths", MOST)
        if not links:
            values, amounts = (), ()
        elif values and not amounts and links[-1].silent:
            raise ValueError(
                f"{NODE}: the last Apply FlexIP Gate has strength 0, so all gates would look alike. Raise its strength."
            )
        grid = [(amount, value) for amount in amounts or (None,) for value in values or (None,)]
        if len(grid) > MOST:
            raise ValueError(
                f"{NODE}: {len(amounts)} strengths with {len(values)} gates each make {len(grid)} pictures, and at most {MOST} fit into one batch. Use fewer."
            )
        rows = [cell for cell in grid for _ in range(len(latent_image["samples"]))]
        if links:
            model = runtime.with_links(model, (*links[:-1], swept(links[-1], rows)))
        reports: list[Report] = []
        model.model_options["transformer_options"][runtime.LISTENER] = reports.extend
        settings = (seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise)
        result = sample(model, *settings, copies=len(grid))
        reports = reports or [Report("reference not used: no step was sampled" if links else NO_GATE)]
        report, text = Report.of_chain(reports), notices.full_text(reports)
        shown = notices.said(report)
        if vae is None:
            blocker = ExecutionBlocker(f"{NODE}: wire a VAE into it to get the contact sheet.")
            return io.NodeOutput(result, blocker, text, ui=shown)
        decoded = decode(vae, result["samples"])
        bare = None
        if len(grid) > 1:
            bare = decode(vae, sample(without_last(model), *settings, copies=1)["samples"])
        shown |= cells_of(cls, decoded, rows, len(latent_image["samples"]), bare, links)
        labels = [f"gate {value:g}" for value in values] or gate_labels(links, len(latent_image["samples"]))
        pictures = by_columns(decoded, len(amounts) or 1, len(labels))
        sheet = contact_sheet(pictures, labels, [f"strength {amount:g}" for amount in amounts])
        return io.NodeOutput(result, sheet, text, ui=shown)


def by_columns(pictures: torch.Tensor, strengths: int, columns: int) -> torch.Tensor:
    """Pictures in the order of the latents (strength, column, rest) -> in the order of the sheet (column, strength, rest)."""
    return pictures.unflatten(0, (strengths, columns, -1)).transpose(0, 1).flatten(0, 2)


def swept(link: Link, rows: list[tuple[float | None, float | None]]) -> Link:
    """The link with what is swept for every row (strength, gate) of the batch."""
    if gates := tuple(gate for _, gate in rows if gate is not None):
        link = dataclasses.replace(link, gates=gates, over_prompts=True)
    if strengths := tuple(strength for strength, _ in rows if strength is not None):
        link = dataclasses.replace(link, strengths=strengths)
    return link


def without_last(model: Any) -> Any:
    """The model whose last link has strength 0: what a sweep is compared with. Its run reports to no node."""
    links = [dataclasses.replace(link, node_id=None) for link in runtime.links_of(model)]
    links[-1] = dataclasses.replace(links[-1], gates=(0.0,), strength=0.0, strengths=())
    model = runtime.with_links(model, tuple(links))
    model.model_options["transformer_options"].pop(runtime.LISTENER, None)
    return model


def cells_of(
    cls: type[io.ComfyNode],
    pictures: torch.Tensor,
    rows: list[tuple[float | None, float | None]],
    latents: int,
    bare: torch.Tensor | None,
    links: tuple[Link, ...],
) -> dict[str, list]:
    """For the node's `ui`, what web/js/sheet.js draws: each picture with its row (strength, gate), the pictures of the same noise
    without the last link, and which node that link is of. Of a video the first frames."""
    node_id = links[-1].node_id if links else None
    files = ui.PreviewImage(pictures[:: len(pictures) // len(rows)], cls=cls).values
    cells = [
        {**file, "gate": gate, "strength": strength, "latent": number % latents}
        for number, (file, (strength, gate)) in enumerate(zip(files, rows))
    ]
    sheet = {
        "cells": cells,
        "columns": len(rows) // len({strength for strength, _ in rows}),
        "bare": [] if bare is None else list(ui.PreviewImage(bare[:: len(bare) // latents], cls=cls).values),
        "node": node_id and node_id.partition(".")[0],  # of a link in the graph that another node stands for: that node
    }
    return {"flexip_sheet": [sheet]}


def gate_labels(links: tuple[Link, ...], latents: int) -> list[str]:
    """Of the columns without a sweep: one, or one per latent where each latent has its own gate."""
    if not links:
        return ["no gate"]
    gates = links[-1].gates
    if isinstance(gates, GateCurve):
        return [f"gate {gates.name}"]
    values = gates.values_for(latents) if isinstance(gates, GateBatch) else gates
    return [f"gate {value:.3g}" for value in values]


def repeat_latent(latent: dict, copies: int) -> dict:
    """Gate-major: the whole latent batch once per gate. `batch_index` says, as elsewhere in ComfyUI, which noise a latent got."""
    samples = latent["samples"]
    count = samples.shape[0]
    indices = latent.get("batch_index") or list(range(count))
    out = {**latent, "samples": torch.cat([samples] * copies), "batch_index": indices * copies}
    if "noise_mask" in latent:
        mask = latent["noise_mask"].reshape(-1, 1, *latent["noise_mask"].shape[-2:])
        out["noise_mask"] = torch.cat([comfy.utils.repeat_to_batch_size(mask, count)] * copies)
    return out


def sample(
    model: Any,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent: dict,
    denoise: float,
    copies: int,
) -> dict:
    """Core's KSampler on `copies` of the latent batch, which all get the noise that a single copy would get."""
    samples = with_channels_of(model, latent)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    sampler = comfy.samplers.sampler_object(sampler_name)
    if copies > 1:
        model = model.clone()
        model.model_options["transformer_options"][runtime.COPIES] = copies
        latent = repeat_latent({**latent, "samples": samples}, copies)
        samples, noise = latent["samples"], torch.cat([noise] * copies)
        sampler = shared_noise(sampler, sampler_name, copies)
    ksampler = comfy.samplers.KSampler(
        model,
        steps=steps,
        device=model.load_device,
        sampler=sampler_name,
        scheduler=scheduler,
        denoise=denoise,
        model_options=model.model_options,
    )
    callback = latent_preview.prepare_callback(model, steps)
    result = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        sampler,
        ksampler.sigmas,
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio_")}
    return {**out, "samples": result}


def shared_noise(sampler: comfy.samplers.KSAMPLER, name: str, copies: int) -> comfy.samplers.KSAMPLER:
    """A stochastic sampler that draws noise for one copy of the batch, as it would alone, and repeats it for the others."""
    function = sampler.sampler_function
    # "random" lets ddim draw new noise for the kept region of an inpainting, per row
    inpaint = {**sampler.inpaint_options, "random": False}
    if "noise_sampler" not in inspect.signature(function).parameters:
        return comfy.samplers.KSAMPLER(function, sampler.extra_options, inpaint)

    def with_shared_noise(
        model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, **options: Any
    ) -> torch.Tensor:
        draw = noise_sampler(name, x[: x.shape[0] // copies], sigmas, (extra_args or {}).get("seed"))
        options["noise_sampler"] = lambda *interval: torch.cat([draw(*interval)] * copies)
        return function(model, x, sigmas, extra_args=extra_args, **options)

    return comfy.samplers.KSAMPLER(with_shared_noise, sampler.extra_options, inpaint)


def noise_sampler(name: str, x: torch.Tensor, sigmas: torch.Tensor, seed: int | None) -> Any:
    """What comfy.k_diffusion.sampling makes for this sampler when it is given none."""
    if name.startswith("dpmpp_") and "sde" in name:
        return k_sampling.BrownianTreeNoiseSampler(
            x, sigmas[sigmas > 0].min(), sigmas.max(), seed=seed, cpu=not name.endswith("_gpu")
        )
    return k_sampling.default_noise_sampler(x, seed=seed)


def decode(vae: Any, samples: torch.Tensor) -> torch.Tensor:
    pictures = vae.decode(samples)
    return pictures.reshape(-1, *pictures.shape[-3:])  # video VAEs add a dimension
