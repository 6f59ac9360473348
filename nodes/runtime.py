"""How a FlexIP chain lives inside ComfyUI's sampling.

The links of a model are an immutable tuple in transformer_options. One OUTER_SAMPLE wrapper projects K and V before the UNet is
loaded and tags every row of every conditioning; one APPLY_MODEL wrapper turns the tags of a UNet call into ready tensors.
How the tags travel is in tags.py.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import Any

import comfy.model_management as mm
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..flexip_core.network.attention import GatedAttention
from ..flexip_core.network.blocks import block_levels, block_of
from ..flexip_core.run.chain import Call, Entry, Link, Own, Setting
from ..flexip_core.run.reference import as_set
from ..flexip_core.run.run import LinkRun, Run
from ..flexip_core.run.schedule import GateCurve, PercentOfSigma
from . import notices, patches, report, tags
from .conditioning import OWN, without_reminders
from .slots import base_attention, fork_patches, has_neighbour, sdpa, slots_of

KEY = "flexip"
LINKS = "flexip_links"
RUN = "flexip_run"
LISTENER = "flexip_listener"  # a callable that receives the reports of the run, one per link
COPIES = "flexip_copies"  # of a sweep: how often the batch holds the latents
PRIVATE = (RUN, LINKS, LISTENER, COPIES, KEY)
NULL_ROLES = {"negative", "empty_negative_prompt"}


def links_of(model: Any) -> tuple[Link, ...]:
    return model.model_options["transformer_options"].get(LINKS, ())


def gated_links(model: Any, node: str) -> tuple[Link, ...]:
    """As `links_of`, for a node that is of no use without a gate."""
    links = links_of(model)
    if not links:
        raise ValueError(
            f"{node}: the model has no FlexIP gate. Put Apply FlexIP Gate between the checkpoint and this node."
        )
    return links


def with_links(model: Any, links: tuple[Link, ...]) -> Any:
    """A clone of `model` with other links in the same places of the chain."""
    model = model.clone()
    model.model_options["transformer_options"][LINKS] = links
    return model


def attach(model: Any, link: Link) -> Any:
    """A clone of `model` with one more link; the patch of each block calls what sat in its slot before."""
    links = links_of(model)
    model = with_links(model, (*links, link))
    slots = slots_of(model.model_options["transformer_options"])
    addresses = [block_of(address) for address in link.network.block_widths]
    for kind, number, index in addresses:
        previous = slots.get((kind, number, index), slots.get((kind, number)))
        patch = GatedAttention(f"{kind}.{number}.{index}", len(links), base_attention, previous, sdpa)
        model.set_model_attn2_replace(patch, kind, number, transformer_index=index)
        if sum(other[:2] == (kind, number) for other in addresses) == 1:
            # packs for SD1.5 use the two-part key, and core looks up the three-part key first
            model.set_model_attn2_replace(patch, kind, number)
    if not links:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare_sampling)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
        model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, fork_patches)
    return model


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    links = options.get(LINKS, ())
    without_reminders(guider.conds)
    if not links:
        logging.warning(
            "FlexIP: another node removed the gates from this model's options, so FlexIP does nothing. Apply FlexIP after it."
        )
        return executor(*args, **kwargs)
    if all(link.silent for link in links):
        result = executor(*args, **kwargs)
        notices.publish([report.silent(link) for link in links], links, options.get(LISTENER))
        return result
    started = time.perf_counter()
    run = _start(guider, links, latent=args[0], copies=options.get(COPIES, 1))
    options[RUN] = run
    try:
        result = executor(*args, **kwargs)
    finally:
        options.pop(RUN, None)
    reports = report.reports(run, links, guider, sigmas=args[3], seconds=time.perf_counter() - started)
    notices.publish(reports, links, options.get(LISTENER))
    return result


def prepare_sampling(executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI makes room on the GPU for activations, by the size of the noise. K and V of every row need room, too, so the
    noise is said to be wider, by the factor that they add; a factor, because context windows call with fewer rows than the noise has."""
    options = kwargs.get("model_options") or {}  # some packs call it with options of their own
    run: Run | None = options.get("transformer_options", {}).get(RUN)
    if run is not None and (bytes_per_row := run.bytes_per_row()):
        activations = model.model.memory_required([1, *noise_shape[1:]])
        noise_shape = [*noise_shape[:-1], math.ceil(noise_shape[-1] * (1 + bytes_per_row / activations))]
    return executor(model, noise_shape, *args, **kwargs)


def _start(guider: Any, links: tuple[Link, ...], latent: torch.Tensor, copies: int) -> Run:
    model = guider.model_patcher
    sampling = model.get_model_object("model_sampling")
    batch, (height, width) = latent.shape[0], latent.shape[-2:]
    for link in links:
        if isinstance(link.gates, tuple) and len(link.gates) not in (1, batch):
            raise ValueError(
                f"ApplyFlexIPGate: got {len(link.gates)} gates for a batch of {batch} latents; give one gate, or one per latent."
            )
    levels = block_levels(model.model.diffusion_model)
    conds = [(name, entry) for name, entries in guider.conds.items() for entry in entries]
    own = [_own(entry, links) for _, entry in conds]
    setting = Setting(batch, copies, height, width, levels)
    all_gates = [*(link.gates for link in links), *(brought.gates for owns in own for brought in owns.values())]
    if any(isinstance(gates, GateCurve) for gates in all_gates):
        # a table of a thousand sigmas: made here, before there is a GPU to wait for
        setting = dataclasses.replace(setting, percent_of=PercentOfSigma(sampling.percent_to_sigma))
    runs = [
        LinkRun(
            link,
            position,
            sampling.percent_to_sigma(link.start_percent),
            sampling.percent_to_sigma(link.end_percent),
            setting,
        )
        for position, link in enumerate(links)
        if not link.silent
    ]
    slots = slots_of(guider.model_options["transformer_options"])
    run = Run(runs, neighbours=sum(has_neighbour(patch) for patch in slots.values()))
    entries = [
        Entry(_text(entry, links), entry.get("prompt_type", name) in NULL_ROLES, owns)
        for (name, entry), owns in zip(conds, own)
    ]
    with torch.no_grad():
        run.prepare(entries, _dtype(model), _load)
    seen = any(link.has_masks for link in runs)
    for number, (_, entry) in enumerate(conds):
        # a new dict: the old one also belongs to guider.original_conds
        entry["model_conds"] = {**entry["model_conds"], tags.TAG: tags.tag(number, batch)}
        if seen:
            entry["model_conds"][tags.VIEW] = tags.view(height, width)
    return run


def _dtype(model: Any) -> torch.dtype:
    """What the model will calculate in. Asked of the patcher: a node's choice reaches the model itself only when it is loaded."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def _own(entry: dict[str, Any], links: tuple[Link, ...]) -> dict[int, Own]:
    """What FlexIPConditioning put into a prompt, for the last link of the chain that reads such a reference and acts at all."""
    own: Own | None = entry.get(OWN)
    if own is None:
        return {}
    fitting = [
        position
        for position, link in enumerate(links)
        if own.reference is None or as_set(own.reference).needs == link.network.needs()
    ]
    if not fitting:
        raise ValueError(
            f"FlexIPConditioning: the reference on a prompt was encoded for other adapters than those on the model ({', '.join(link.title for link in links)}). "
            "Wire the same adapters into its Encode Reference."
        )
    acting = [position for position in fitting if not links[position].silent]
    return {
        position: dataclasses.replace(own, gates=links[position].gates) if links[position].over_prompts else own
        for position in acting[-1:]
    }


def _text(entry: dict[str, Any], links: tuple[Link, ...]) -> torch.Tensor:
    text = entry.get("cross_attn")
    if text is None:
        raise ValueError(
            "ApplyFlexIPGate: expected a text conditioning, got one without text. Connect CLIPTextEncode to the sampler's positive and negative."
        )
    wanted = links[0].network.text_width  # of all links: each was checked against the model
    if text.shape[-1] != wanted:
        raise ValueError(
            f"ApplyFlexIPGate: the model reads text of width {wanted}, but a prompt on the sampler has width {text.shape[-1]}. Encode it with the CLIP of the same checkpoint."
        )
    if not text.isfinite().all():
        raise ValueError(
            "ApplyFlexIPGate: a prompt on the sampler contains values that are not numbers (NaN or infinite). The node that encoded it failed, often because its CLIP ran in half precision; encode it again."
        )
    return text


def _load(run: LinkRun) -> torch.device:
    """The adapters' weights on their device; the UNet's own load, which follows, evicts them if it must."""
    patcher, references = run.link.patcher, as_set(run.link.reference).references
    values = max(sum(value.numel() for value in reference.features.values()) for reference in references)
    mm.load_models_gpu([patcher], memory_required=64 * 4 * values)  # float32 activations, generously
    return patcher.load_device


def apply_model(
    executor: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] = {},  # noqa: B006 - core's own signature
    **kwargs: Any,
) -> Any:
    run: Run | None = transformer_options.get(RUN)
    tag, view = kwargs.pop(tags.TAG, None), kwargs.pop(tags.VIEW, None)
    # everything that is not a tensor stays out of the region that torch.compile sees
    options = {key: value for key, value in transformer_options.items() if key not in PRIVATE}
    if run is not None and c_crossattn is not None:
        dtype = executor.class_obj.get_dtype_inference()
        height, width = x.shape[-2:]
        if tag is not None:
            rows = tags.read(tag, view, x.shape[0], height, width, options)
        else:
            with torch.no_grad():
                rows = run.untagged(c_crossattn, len(options["cond_or_uncond"]), dtype)
        sigma = float(options["sigmas"][0]) if run.reads_sigma else None
        call = Call(rows, height, width, x.device, dtype)
        options[KEY], structure = run.assemble(call, sigma)
        if structure:
            kwargs[structure] = None
            options = patches.followed(options, KEY, run, call, sigma)
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
