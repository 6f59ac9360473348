"""A look at a finished latent: noised again to a few levels, one call of the positive conditioning each, and what the patches saw.

On a clone of the model; the gated model itself knows nothing of it and costs the same either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ..flexip_core.measuring import maps
from ..flexip_core.network.attention import GatedAttention, block_grid
from ..flexip_core.network.blocks import block_of
from . import patches, runtime, tags
from .notices import Report
from .slots import slots_of

KEY = "flexip_maps"  # of our wrapper, and in transformer_options: what a UNet call shows
TAG, VIEW = "flexip_maps_tag", "flexip_maps_view"  # in model_conds: FlexIP takes its own off before us


class Recorder:
    """What one look gathers. The patches of a clone of the model call `see`; nothing else refers to it."""

    def __init__(self, measure: maps.Measure, groups: int, samples: torch.Tensor, first_prompt_only: bool):
        batch, (height, width) = samples.shape[0], samples.shape[-2:]
        self.measure = measure
        self.mean = maps.MapMean(groups, batch, height, width)
        self.first_prompt_only = first_prompt_only
        self.weights: dict[int, torch.Tensor] = {}
        self.runs: Sequence[Any] = ()
        self.sigma = 0.0
        self.seen: dict[float, bool] = {}  # noise level -> whether a map of it could be placed
        self.calls = 0

    def begin(self, conds: list[dict], x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any]) -> None:
        """Before the calls of one noise level: how much each conditioning counts at each place, as core mixes them."""
        run = options["transformer_options"].get(runtime.RUN)
        self.runs = run.links if run is not None else ()
        self.sigma = float(sigma[0])
        self.weights = weights_of(conds, x, sigma)
        if self.first_prompt_only:
            self.weights = {entry: weight for entry, weight in self.weights.items() if entry == 0}

    def see(
        self, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict, address: str
    ) -> int:
        """Called by a block's patch with its result, as IPAdapter_plus' additions are; adds nothing."""
        self.calls += 1
        if KEY not in options:  # a call with another node's own conditioning
            return 0
        rows, height, width = options[KEY]
        rows = patches.moved_rows(rows, options)
        grid = block_grid(options)
        if grid is None or grid[0] * grid[1] != q.shape[1]:
            raise RuntimeError(
                f"FlexIP: block {address} has {q.shape[1]} image tokens, which are not a picture of {grid}. "
                "Another node merges tokens in the UNet; remove it for the maps."
            )
        block = maps.Block(address, q, k, v, options["n_heads"], grid, rows, options.get(runtime.KEY, {}))
        found = self.measure(self.runs, block)
        if found is not None:
            placed = self.mean.add(found.unflatten(2, grid), rows, height, width, self.weights)
            self.seen[self.sigma] = self.seen.get(self.sigma, False) or placed
        return 0


def weights_of(conds: list[dict], x: torch.Tensor, sigma: torch.Tensor) -> dict[int, torch.Tensor]:
    """Conditioning -> (batch, h, w); without those that are not used at this noise level."""
    weights = {}
    for entry, cond in enumerate(conds):
        part = comfy.samplers.get_area_and_mult(cond, x, sigma)
        if part is None:
            continue
        whole = torch.zeros(x.shape[0], *x.shape[-2:])
        top, left, height, width = 0, 0, *x.shape[-2:]
        if part.area is not None:
            height, width, top, left = part.area
        whole[:, top : top + height, left : left + width] = part.mult[:, 0].cpu()
        weights[entry] = whole
    rest = 1 - sum(weight for entry, weight in weights.items() if "default" not in conds[entry])
    # a default conditioning fills what the others leave
    return {
        entry: rest.clamp_min(0) if "default" in conds[entry] and torch.is_tensor(rest) else weight
        for entry, weight in weights.items()
    }


class Looker(comfy.samplers.CFGGuider):
    """Evaluates the positive conditioning and nothing else, so it also skips any guidance that a node put on the model."""

    recorder: Recorder

    def predict_noise(self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict, seed: int) -> torch.Tensor:
        positive = self.conds["positive"]
        self.recorder.begin(positive, x, timestep, model_options)
        return comfy.samplers.calc_cond_batch(self.inner_model, [positive], x, timestep, model_options)[0]


def look(
    model: Any,
    positive: list,
    latent: dict,
    percents: Sequence[float],
    seed: int,
    blocks: Sequence[str],
    recorder: Recorder,
) -> tuple[str, ...]:
    """One call of the model per noise level; returns what FlexIP warned of."""
    reports: list[Report] = []
    model = watched(model, blocks, recorder)
    model.model_options["transformer_options"][runtime.LISTENER] = reports.extend
    guider = Looker(model)
    guider.recorder = recorder
    samples = latent["samples"]
    guider.inner_set_conds({"positive": tagged(positive, samples)})
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([*(sampling.percent_to_sigma(percent) for percent in percents), 0.0])
    try:
        guider.sample(
            comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
            samples,
            comfy.samplers.KSAMPLER(look_at_levels),
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(percents)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    finally:
        recorder.runs = ()  # they hold K and V on the device
    return tuple(warning for report in reports for warning in report.warnings)


def look_at_levels(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict, callback: Any, disable: bool
) -> torch.Tensor:
    """A sampler that does not sample: the finished latent with noise at each level, and one call of the model."""
    sampling = model.inner_model.inner_model.model_sampling
    for step, sigma in enumerate(sigmas[:-1]):
        x = sampling.noise_scaling(sigma, model.noise, model.latent_image)
        denoised = model(x, sigma * x.new_ones(x.shape[0]), **extra_args)
        callback({"i": step, "denoised": denoised, "x": x, "sigma": sigma, "sigma_hat": sigma})
    return model.latent_image


def watched(model: Any, blocks: Sequence[str], recorder: Recorder) -> Any:
    """A clone whose patches tell the recorder what they do; a block that another node took over after FlexIP is left out."""
    links = runtime.links_of(model)
    model = runtime.with_links(model, tuple(dataclasses.replace(link, node_id=None) for link in links))
    # a compiled model would not run the new patches
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, tell_rows)
    slots = slots_of(model.model_options["transformer_options"])
    for address in blocks:
        patch = slots.get(block_of(address))
        if isinstance(patch, GatedAttention):
            patch.add(recorder.see, address=address)  # of this clone only: see GatedAttention.fork
    return model


def tagged(positive: list, samples: torch.Tensor) -> list:
    """The conditionings with tags of our own, because FlexIP's are gone where the rows of a call are known."""
    view = tags.view(*samples.shape[-2:])
    out = []
    for entry, (text, extra) in enumerate(positive):
        own = {TAG: tags.tag(entry, samples.shape[0]), VIEW: view}
        out.append([text, {**extra, "model_conds": {**extra.get("model_conds", {}), **own}}])
    return out


def tell_rows(
    executor: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] = {},  # noqa: B006 - core's own signature
    **kwargs: Any,
) -> Any:
    """APPLY_MODEL: which conditioning, latent and part of the picture each row of the call is, for the recorder."""
    tag, view = kwargs.pop(TAG, None), kwargs.pop(VIEW, None)
    if tag is not None:
        height, width = x.shape[-2:]
        rows = tags.read(tag, view, x.shape[0], height, width, transformer_options)
        transformer_options = {**transformer_options, KEY: (rows, height, width)}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
