"""The decoupled cross-attention beside a frozen text cross-attention (paper Fig. 3, "Dynamic Weight Gating").

Shape legend: b batch, n image tokens (gh * gw of the block's grid), m adapter tokens, h heads, d head width, c = h * d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

Sdpa = Callable[..., torch.Tensor]  # torch's scaled_dot_product_attention or one called as it is


class Branch(NamedTuple):
    """K and V of one softmax, ready for a block: everything that does not depend on the place is folded in.

    In gate mode `tokens` with a gate per place both adapters share the softmax and `place_gate` weighs them: `first` tells
    the preservation tokens (1) from the others (0).
    """

    k: torch.Tensor  # (b, m, c)
    v: torch.Tensor  # (b, m, c)
    mask: torch.Tensor | None = None  # (b, 1, 1, m): bool, the tokens that exist; or numbers added to the scores
    place: torch.Tensor | None = None  # (b or 1, gh, gw): factor of the result at each place
    place_gate: torch.Tensor | None = None  # (b or 1, gh, gw): the gate at each place
    first: torch.Tensor | None = None  # (m, 1, 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    sdpa: Sdpa = F.scaled_dot_product_attention,
) -> torch.Tensor:
    """softmax(q kT / sqrt(d)) v for q (b, n, c) and k, v (b, m, c); returns (b, n, c).

    A kernel of torch's whatever attention ComfyUI uses elsewhere: m is tiny, and quantising kernels ruin such short sums.
    """
    b, n, c = q.shape
    q, k, v = (t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))  # b h n|m d
    return sdpa(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, n, c)


def place_gated_attention(
    q: torch.Tensor, branch: Branch, gate: torch.Tensor, heads: int, sdpa: Sdpa = F.scaled_dot_product_attention
) -> torch.Tensor:
    """Gate mode `tokens` with a gate per image token, gate (b or 1, n, 1): softmax over [gate * Kp ; (1 - gate) * Ks].

    A query's gate scales the scores of the first tokens, 1 - gate those of the others, and the same factors their values. Both fit
    into one softmax when each token has its own half of a head twice as wide.
    """
    assert branch.first is not None  # comes with every place_gate
    b, n, c = q.shape
    q = q.view(b, n, heads, -1)
    k, v = (t.view(t.shape[0], t.shape[1], heads, -1) for t in (branch.k, branch.v))
    gate, first = gate.unsqueeze(-1), branch.first  # (b, n, 1, 1), (m, 1, 1)
    scale = q.shape[-1] ** -0.5
    q = torch.cat([q * gate, q * (1 - gate)], dim=-1)
    k, v = (torch.cat([t * first, t * (1 - first)], dim=-1) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # b h n|m 2d
    out = sdpa(q, k, v, attn_mask=branch.mask, scale=scale).transpose(1, 2)  # b n h 2d
    first_half, second_half = out.chunk(2, dim=-1)
    return (first_half * gate + second_half * (1 - gate)).reshape(b, n, c)


def decoupled_attention(
    base: torch.Tensor,
    q: torch.Tensor,
    branches: tuple[Branch, ...],
    heads: int,
    grid: tuple[int, int] | None = None,
    sdpa: Sdpa = F.scaled_dot_product_attention,
) -> torch.Tensor:
    """base + sum of Attn(q, K, V): one branch per adapter in gate mode `outputs`, one in all in mode `tokens`.

    `grid` (height, width) of the block's image tokens, as the model reports it: where a neighbour (deep shrink) runs the block at
    another size than the UNet would, the maps of the branches follow. `sdpa` is torch's scaled_dot_product_attention, or a
    wrapper of it that chooses the backend.
    """
    for branch in branches:
        if branch.k.shape[0] not in (1, q.shape[0]):
            raise RuntimeError(
                f"FlexIP: a block has {q.shape[0]} rows where the model was called with {branch.k.shape[0]}. "
                "A node changes the rows inside the UNet in a way that FlexIP cannot see; take it or FlexIP off."
            )
        branch = _in_dtype(branch, q.dtype)
        if branch.place_gate is None:
            added = attention(q, branch.k, branch.v, heads, branch.mask, sdpa)
        else:
            added = place_gated_attention(q, branch, per_token(branch.place_gate, q.shape[1], grid), heads, sdpa)
        if branch.place is not None:
            added = added * per_token(branch.place, q.shape[1], grid)
        base = base + added
    return base


def _in_dtype(branch: Branch, dtype: torch.dtype) -> Branch:
    """A neighbour may run attention in another precision than the model's."""
    if branch.k.dtype == dtype:
        return branch
    numbers = {name: t for name, t in branch._asdict().items() if t is not None and t.dtype != torch.bool}
    return branch._replace(**{name: t.to(dtype) for name, t in numbers.items()})


def per_token(place: torch.Tensor, tokens: int, grid: tuple[int, int] | None) -> torch.Tensor:
    """(b, gh, gw) -> (b, tokens, 1)"""
    if place.shape[1] * place.shape[2] != tokens:
        if grid is None or grid[0] * grid[1] != tokens:
            raise RuntimeError(
                f"FlexIP: a block has {tokens} image tokens where the mask was laid out for {place.shape[1]} x {place.shape[2]}. "
                "A node changes the size of the image inside the UNet without telling it; use FlexIP without a mask there."
            )
        place = F.interpolate(place.unsqueeze(1), size=grid, mode="area").squeeze(1)
    return place.flatten(1).unsqueeze(-1)


class GatedAttention:
    """What sits in ComfyUI's attn2 replace slot of one block for one link of a FlexIP chain.

    It reads nothing but ready tensors from `extra_options["flexip"][(position, address)]`: torch.compile bakes every float,
    lookup or object read here into its graph, and ComfyUI's compile node drops the guards that would notice a change.
    Never modified once sampling starts; `fork` gives a clone of the model its own object (see nodes/apply.py).
    """

    def __init__(
        self,
        address: str,
        position: int,
        base_attention: Callable[..., torch.Tensor],
        previous: Any = None,
        sdpa: Sdpa = F.scaled_dot_product_attention,
    ):
        self.address = address
        self.position = position
        self.base_attention = base_attention
        self.previous = previous
        self.sdpa = sdpa
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
            out = decoupled_attention(out, q, branches, heads, block_grid(extra_options), self.sdpa)
        return _run_added(self.added, out, q, k, v, extra_options) if self.added else out

    def add(self, callback: Callable, **kwargs: Any) -> None:
        """What IPAdapter_plus, InstantID and PuLID call on the object they find in the slot when applied after us."""
        self.added += ((callback, kwargs),)

    def fork(self) -> GatedAttention:
        twin = GatedAttention(self.address, self.position, self.base_attention, self.previous, self.sdpa)
        twin.added = self.added
        return twin

    # ComfyUI asks what it finds in a slot for the following; what sat there before us it can no longer see.

    def to(self, device_or_dtype: Any) -> GatedAttention:
        moved = self.previous.to(device_or_dtype) if hasattr(self.previous, "to") else self.previous
        if moved is self.previous:
            return self
        twin = self.fork()  # not in place: with several GPUs each device has its own
        twin.previous = moved
        return twin

    def models(self) -> list[Any]:
        return self.previous.models() if hasattr(self.previous, "models") else []

    def cleanup(self) -> None:
        if hasattr(self.previous, "cleanup"):
            self.previous.cleanup()


def block_grid(extra_options: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the running block's image tokens; ComfyUI notes (b, c, h, w) at every transformer."""
    shape = extra_options.get("activations_shape")
    return (shape[-2], shape[-1]) if shape is not None and len(shape) == 4 else None


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
