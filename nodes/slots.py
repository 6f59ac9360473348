"""The slots that patches of a UNet's text cross-attentions sit in, ours and those of other nodes.

A slot's key in patches_replace["attn2"] is (kind, number, index) or, as packs for SD1.5 write it, (kind, number).
"""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
import torch

from ..flexip_core.network.attention import GatedAttention
from ..flexip_core.network.blocks import block_of
from ..flexip_core.run.run import LinkRun


def base_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any) -> torch.Tensor:
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads, **kwargs)  # looked up late: packs rebind it


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Torch's attention with the backends in ComfyUI's own order: by itself torch may prefer one that plans again for every shape."""
    return comfy.ops.scaled_dot_product_attention(q, k, v, **kwargs)  # looked up late, too


def fork_patches(source: Any, clone: Any) -> None:
    """ON_CLONE: clones share the objects in patches_replace, and neighbours append to them."""
    slots = slots_of(clone.model_options["transformer_options"])
    forks: dict[tuple[int, str], GatedAttention] = {}
    for key, patch in slots.items():
        if isinstance(patch, GatedAttention):
            # one object under both keys of a block again: moving what sat there before us may have made two
            slots[key] = forks.setdefault((patch.position, patch.address), patch.fork())


def lost_blocks(run: LinkRun, options: dict[str, Any]) -> list[tuple[str, str]]:
    """Blocks that another node took over after us, with the class of what sits there: it may or may not call us."""
    slots = slots_of(options)
    taken = []
    for address in run.link.network.block_widths:
        kind, number, index = block_of(address)
        patch = slots.get((kind, number, index), slots.get((kind, number)))
        while isinstance(patch, GatedAttention) and patch.position > run.position:
            patch = patch.previous
        if not (isinstance(patch, GatedAttention) and patch.position == run.position):
            taken.append((address, type(patch).__name__))
    return taken


def hidden_neighbours(options: dict[str, Any]) -> list[str]:
    """Patches that a later node put under the two-part key of a block, where core never looks because of our three-part key."""
    slots = slots_of(options)
    return [
        type(patch).__name__
        for key, patch in slots.items()
        if len(key) == 2
        and not isinstance(patch, GatedAttention)
        and isinstance(ours := slots.get(key + (0,)), GatedAttention)
        and ours.previous is not patch
    ]


def slots_of(options: dict[str, Any]) -> dict:
    return options.get("patches_replace", {}).get("attn2", {})


def has_neighbour(patch: Any) -> bool:
    return isinstance(patch, GatedAttention) and (
        bool(patch.added) or (patch.previous is not None and not isinstance(patch.previous, GatedAttention))
    )
