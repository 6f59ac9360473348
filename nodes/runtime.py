"""How a FlexIP chain lives inside ComfyUI's sampling (design section "Inside ComfyUI").

The links of a model are an immutable tuple in transformer_options. One OUTER_SAMPLE wrapper projects K and V before the UNet is
loaded and tags every conditioning; one APPLY_MODEL wrapper turns the tags of a UNet call into ready tensors for the patches.
"""
from __future__ import annotations

import time
from typing import Any

import comfy.conds
import comfy.ldm.modules.attention
import comfy.model_management as mm
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..flexip_core.attention import GatedAttention
from ..flexip_core.run import Entry, Link, LinkRun, Run
from . import report

KEY = "flexip"
LINKS = "flexip_links"
RUN = "flexip_run"
LISTENER = "flexip_listener"  # a callable that receives the report's text
TAG = "flexip_tag"
ROWS = "flexip_rows"
NULL_ROLES = {"negative", "empty_negative_prompt"}


class Tag(comfy.conds.CONDRegular):
    """Which conditioning of the run a chunk of the batch is: a Python index, so that nothing is read back from the GPU."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> Tag:
        return self

    def can_concat(self, other: comfy.conds.CONDRegular) -> bool:
        return isinstance(other, Tag)

    def concat(self, others: list[Tag]) -> tuple[int, ...]:
        return (self.cond, *(other.cond for other in others))

    def size(self) -> list[int]:
        return [1]


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
    if all(link.strength == 0 for link in links):
        return executor(*args, **kwargs)
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
            raise ValueError(f"ApplyFlexIPGate: got {len(link.gates)} gates for a batch of {batch} latents; give one gate, or one per latent.")
    runs = [
        LinkRun(link, position, sampling.percent_to_sigma(link.start_percent), sampling.percent_to_sigma(link.end_percent))
        for position, link in enumerate(links) if link.strength != 0
    ]
    slots = _slots(guider.model_options["transformer_options"])
    run = Run(runs, batch, neighbours=sum(_has_neighbour(patch) for patch in slots.values()))
    conds = [(name, entry) for name, entries in guider.conds.items() for entry in entries]
    entries = [Entry(_text(entry), null=entry.get("prompt_type", name) in NULL_ROLES) for name, entry in conds]
    with torch.no_grad():
        run.prepare(entries, model.model.get_dtype_inference(), _load)
    rows = {ROWS: comfy.conds.CONDRegular(torch.arange(batch).view(-1, 1, 1))} if run.per_row else {}
    for tag, (_, entry) in enumerate(conds):
        # a new dict: the old one also belongs to guider.original_conds
        entry["model_conds"] = {**entry["model_conds"], TAG: Tag(tag), **rows}
    return run


def _text(entry: dict[str, Any]) -> torch.Tensor:
    if entry.get("cross_attn") is None:
        raise ValueError("ApplyFlexIPGate: expected a text conditioning, got one without text. Connect CLIPTextEncode to the sampler's positive and negative.")
    return entry["cross_attn"]


def _load(link: Link) -> torch.device:
    """The adapters' weights on their device; the UNet's own load, which follows, evicts them if it must."""
    patches = max(value[0].numel() for value in link.reference.features.values()) * link.reference.count
    mm.load_models_gpu([link.patcher], memory_required=64 * 4 * patches)
    return link.patcher.load_device


def apply_model(executor: Any, x: torch.Tensor, t: torch.Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
                transformer_options: dict[str, Any] = {}, **kwargs: Any) -> Any:  # noqa: B006 - core's own signature
    run: Run | None = transformer_options.get(RUN)
    tags, rows = kwargs.pop(TAG, None), kwargs.pop(ROWS, None)
    # everything that is not a tensor stays out of the region that torch.compile sees
    options = {key: value for key, value in transformer_options.items() if key not in (RUN, LINKS, LISTENER, KEY)}
    if run is not None and c_crossattn is not None:
        dtype = executor.class_obj.get_dtype_inference()
        if tags is None:
            with torch.no_grad():
                tags = run.untagged(c_crossattn, len(options["cond_or_uncond"]), dtype)
        sigma = float(options["sigmas"][0]) if run.reads_sigma else None
        windowed = "context_window" in options or "ad_params" in options
        options[KEY], structure = run.assemble(tags, rows, x, dtype, sigma, windowed)
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
        type(patch).__name__ for key, patch in slots.items()
        if len(key) == 2 and not isinstance(patch, GatedAttention) and isinstance(slots.get((*key, 0)), GatedAttention)
        and slots[(*key, 0)].previous is not patch
    ]


def _slots(options: dict[str, Any]) -> dict:
    return options.get("patches_replace", {}).get("attn2", {})


def _block(address: str) -> tuple[str, int, int]:
    kind, number, index = address.split(".")
    return kind, int(number), int(index)


def _has_neighbour(patch: Any) -> bool:
    return isinstance(patch, GatedAttention) and (bool(patch.added) or (patch.previous is not None and not isinstance(patch.previous, GatedAttention)))


