"""The decoupled cross-attention beside a frozen text cross-attention (paper Fig. 3, "Dynamic Weight Gating").

Shape legend: b batch, n image tokens, m adapter tokens, h heads, d head width, c = h * d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Branch = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]
"""K (b, m, c), V (b, m, c) with gate and strength folded in, and a bool mask (b, 1, 1, m) of the tokens that exist."""


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q kT / sqrt(d)) v for q (b, n, c) and k, v (b, m, c); returns (b, n, c).

    Torch's own kernel whatever attention ComfyUI uses elsewhere: m is tiny, and quantising kernels ruin such short sums.
    """
    b, n, c = q.shape
    q, k, v = (t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))  # b h n|m d
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, n, c)


def decoupled_attention(base: torch.Tensor, q: torch.Tensor, branches: tuple[Branch, ...], heads: int) -> torch.Tensor:
    """base + sum of Attn(q, K, V): one branch per adapter in gate mode `outputs`, one in all in mode `tokens`."""
    for k, v, mask in branches:
        if k.dtype != q.dtype:  # a neighbour runs attention in another precision than the model's
            k, v = k.to(q.dtype), v.to(q.dtype)
        base = base + attention(q, k, v, heads, mask)
    return base


class GatedAttention:
    """What sits in ComfyUI's attn2 replace slot of one block for one link of a FlexIP chain.

    It reads nothing but ready tensors from `extra_options["flexip"][(position, address)]`: torch.compile bakes every float,
    lookup or object read here into its graph, and ComfyUI's compile node drops the guards that would notice a change.
    Never modified once sampling starts; `fork` gives a clone of the model its own object (see nodes/apply.py).
    """

    def __init__(
        self, address: str, position: int, base_attention: Callable[..., torch.Tensor], previous: Callable | None = None
    ):
        self.address = address
        self.position = position
        self.base_attention = base_attention
        self.previous = previous
        self.added: tuple[tuple[Callable, dict[str, Any]], ...] = ()

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        heads = extra_options["n_heads"]
        if self.previous is not None:
            out = self.previous(q, k, v, extra_options)
        else:
            out = self.base_attention(
                q, k, v, heads, attn_precision=extra_options.get("attn_precision"), transformer_options=extra_options
            )
        branches = extra_options.get("flexip", {}).get((self.position, self.address))
        if branches is not None:
            out = decoupled_attention(out, q, branches, heads)
        return _run_added(self.added, out, q, k, v, extra_options) if self.added else out

    def add(self, callback: Callable, **kwargs: Any) -> None:
        """What IPAdapter_plus, InstantID and PuLID call on the object they find in the slot when applied after us."""
        self.added += ((callback, kwargs),)

    def fork(self) -> GatedAttention:
        twin = GatedAttention(self.address, self.position, self.base_attention, self.previous)
        twin.added = self.added
        return twin


def _run_added(
    added: tuple, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
) -> torch.Tensor:
    """Callbacks as those packs define them: (out, q, k, v, extra_options, **kwargs) -> addition, within sigma_start..sigma_end."""
    sigma = None
    for callback, kwargs in added:
        if "sigma_start" in kwargs or "sigma_end" in kwargs:
            if sigma is None:
                sigma = float(extra_options["sigmas"][0])
            if not kwargs.get("sigma_end", float("-inf")) <= sigma <= kwargs.get("sigma_start", float("inf")):
                continue
        out = out + callback(out, q, k, v, extra_options, **kwargs)
    return out.to(q.dtype)
