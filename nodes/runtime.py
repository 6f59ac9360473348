"""How a FlexIP chain lives inside ComfyUI's sampling.

The links of a model are an immutable tuple in transformer_options. One OUTER_SAMPLE wrapper projects K and V before the UNet is
loaded and tags every row of every conditioning; one APPLY_MODEL wrapper turns the tags of a UNet call into ready tensors.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import comfy.conds
import comfy.ldm.modules.attention
import comfy.model_management as mm
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..flexip_core.attention import GatedAttention
from ..flexip_core.run import Entry, Link, LinkRun, Rows, Run
from . import report

KEY = "flexip"
LINKS = "flexip_links"
RUN = "flexip_run"
LISTENER = "flexip_listener"  # a callable that receives the report's text
TAG = "flexip_tag"
ROWS = 2**20  # more than any batch has
NULL_ROLES = {"negative", "empty_negative_prompt"}


def tag(entry: int, batch: int) -> comfy.conds.CONDRegular:
    """(batch, 1, 1): which conditioning of the run a row belongs to, and its row in the latent batch, as one number.

    A tensor with a row per latent, so that whatever repeats, cuts, windows or reorders the batch does the same to it. It stays on
    the CPU, so that reading it back waits for nothing.
    """
    return comfy.conds.CONDRegular((entry * ROWS + torch.arange(batch)).view(-1, 1, 1))


def read_tags(tags: torch.Tensor, count: int) -> Rows:
    """The rows of a UNet call; `count` is how many it has. Core cuts or repeats per-row conditionings without a word."""
    numbers = tags.flatten().tolist()
    if len(numbers) != count:
        raise RuntimeError(
            f"FlexIP: a model call of {count} rows came with tags for {len(numbers)}; another node resized the batch without its conditionings."
        )
    return tuple(divmod(int(number), ROWS) for number in numbers)


def links_of(model: Any) -> tuple[Link, ...]:
    return model.model_options["transformer_options"].get(LINKS, ())


def with_links(model: Any, links: tuple[Link, ...]) -> Any:
    """A clone of `model` with other links in the same places of the chain."""
    model = model.clone()
    model.model_options["transformer_options"][LINKS] = links
    return model


def attach(model: Any, link: Link) -> Any:
    """A clone of `model` with one more link; the patch of each block calls what sat in its slot before."""
    links = links_of(model)
    model = with_links(model, (*links, link))
    slots = _slots(model.model_options["transformer_options"])
    addresses = [_block(address) for address in link.network.block_widths]
    for kind, number, index in addresses:
        previous = slots.get((kind, number, index), slots.get((kind, number)))
        patch = GatedAttention(f"{kind}.{number}.{index}", len(links), base_attention, previous)
        model.set_model_attn2_replace(patch, kind, number, transformer_index=index)
        if sum(other[:2] == (kind, number) for other in addresses) == 1:
            # packs for SD1.5 use the two-part key, and core looks up the three-part key first
            model.set_model_attn2_replace(patch, kind, number)
    if not links:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
        model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, fork_patches)
    return model


def base_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any) -> torch.Tensor:
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads, **kwargs)  # looked up late: packs rebind it


def fork_patches(source: Any, clone: Any) -> None:
    """ON_CLONE: clones share the objects in patches_replace, and neighbours append to them."""
    slots = _slots(clone.model_options["transformer_options"])
    forks: dict[int, GatedAttention] = {}
    for key, patch in slots.items():
        if isinstance(patch, GatedAttention):
            slots[key] = forks.setdefault(id(patch), patch.fork())


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    links = options.get(LINKS, ())
    if not links:
        logging.warning(
            "FlexIP: another node took the gates off this model's options, so FlexIP does nothing. Apply FlexIP after it."
        )
        return executor(*args, **kwargs)
    if all(link.strength == 0 for link in links):
        result = executor(*args, **kwargs)
        report.publish("strength 0: FlexIP does nothing.", links, options.get(LISTENER))
        return result
    started = time.perf_counter()
    run = _start(guider, links, batch=args[0].shape[0])
    options[RUN] = run
    try:
        result = executor(*args, **kwargs)
    finally:
        options.pop(RUN, None)
    text = report.text(run, links, guider, sigmas=args[3], seconds=time.perf_counter() - started)
    report.publish(text, links, options.get(LISTENER))
    return result


def _start(guider: Any, links: tuple[Link, ...], batch: int) -> Run:
    model = guider.model_patcher
    sampling = model.get_model_object("model_sampling")
    for link in links:
        if len(link.gates) not in (1, batch):
            raise ValueError(
                f"ApplyFlexIPGate: got {len(link.gates)} gates for a batch of {batch} latents; give one gate, or one per latent."
            )
    runs = [
        LinkRun(
            link, position, sampling.percent_to_sigma(link.start_percent), sampling.percent_to_sigma(link.end_percent)
        )
        for position, link in enumerate(links)
        if link.strength != 0
    ]
    slots = _slots(guider.model_options["transformer_options"])
    run = Run(runs, neighbours=sum(_has_neighbour(patch) for patch in slots.values()))
    conds = [(name, entry) for name, entries in guider.conds.items() for entry in entries]
    entries = [Entry(_text(entry, links), null=entry.get("prompt_type", name) in NULL_ROLES) for name, entry in conds]
    with torch.no_grad():
        run.prepare(entries, model.model.get_dtype_inference(), _load)
    for number, (_, entry) in enumerate(conds):
        # a new dict: the old one also belongs to guider.original_conds
        entry["model_conds"] = {**entry["model_conds"], TAG: tag(number, batch)}
    return run


def _text(entry: dict[str, Any], links: tuple[Link, ...]) -> torch.Tensor:
    text = entry.get("cross_attn")
    if text is None:
        raise ValueError(
            "ApplyFlexIPGate: expected a text conditioning, got one without text. Connect CLIPTextEncode to the sampler's positive and negative."
        )
    wanted = links[0].network.text_width  # of all links: each was checked against the model
    if text.shape[-1] != wanted:
        raise ValueError(
            f"ApplyFlexIPGate: the model reads text {wanted} wide, but a prompt on the sampler is {text.shape[-1]} wide. Encode it with the CLIP of the same checkpoint."
        )
    return text


def _load(link: Link) -> torch.device:
    """The adapters' weights on their device; the UNet's own load, which follows, evicts them if it must."""
    values = sum(value.numel() for value in link.reference.features.values())
    mm.load_models_gpu([link.patcher], memory_required=64 * 4 * values)  # float32 activations, generously
    return link.patcher.load_device


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
    tags = kwargs.pop(TAG, None)
    # everything that is not a tensor stays out of the region that torch.compile sees
    options = {key: value for key, value in transformer_options.items() if key not in (RUN, LINKS, LISTENER, KEY)}
    if run is not None and c_crossattn is not None:
        dtype = executor.class_obj.get_dtype_inference()
        if tags is not None:
            rows = read_tags(tags, x.shape[0])
        else:
            with torch.no_grad():
                rows = run.untagged(c_crossattn, len(options["cond_or_uncond"]), dtype)
        sigma = float(options["sigmas"][0]) if run.reads_sigma else None
        options[KEY], structure = run.assemble(rows, x.device, dtype, sigma)
        if structure:
            kwargs[structure] = None
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def lost_blocks(run: LinkRun, options: dict[str, Any]) -> list[str]:
    """Blocks that another node took over after us, by the class of what sits there: it may or may not call us."""
    slots = _slots(options)
    taken = []
    for address in run.link.network.block_widths:
        kind, number, index = _block(address)
        patch = slots.get((kind, number, index), slots.get((kind, number)))
        while isinstance(patch, GatedAttention) and patch.position > run.position:
            patch = patch.previous
        if not (isinstance(patch, GatedAttention) and patch.position == run.position):
            taken.append(type(patch).__name__)
    return taken


def hidden_neighbours(options: dict[str, Any]) -> list[str]:
    """Patches that a later node put under the two-part key of a block, where core never looks because of our three-part key."""
    slots = _slots(options)
    return [
        type(patch).__name__
        for key, patch in slots.items()
        if len(key) == 2
        and not isinstance(patch, GatedAttention)
        and isinstance(slots.get((*key, 0)), GatedAttention)
        and slots[(*key, 0)].previous is not patch
    ]


def _slots(options: dict[str, Any]) -> dict:
    return options.get("patches_replace", {}).get("attn2", {})


def _block(address: str) -> tuple[str, int, int]:
    kind, number, index = address.split(".")
    return kind, int(number), int(index)


def _has_neighbour(patch: Any) -> bool:
    return isinstance(patch, GatedAttention) and (
        bool(patch.added) or (patch.previous is not None and not isinstance(patch.previous, GatedAttention))
    )
