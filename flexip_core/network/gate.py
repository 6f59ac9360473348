"""The gate: pure functions on numbers and tensors (paper section 3.4, "Dynamic Weight Gating").

gate = 1 is all preservation, 0 all personalization. Both gate modes only rescale K and V that are already projected.
Shape legend: b batch, n tokens, c inner width, gh x gw a block's image tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .attention import Branch

Numbers = tuple[float, ...]
"""One number for all rows of the batch, or one per row."""


class Place(NamedTuple):
    """What depends on the place in the picture, on one block's grid, each (b or 1, gh, gw) in 0..1."""

    strength: torch.Tensor | None = None  # 1 where the reference acts, 0 where it does not
    gate: torch.Tensor | None = None  # multiplies the gate


NO_PLACE = Place()


def gated_branches(
    mode: str,
    gates: Numbers,
    strengths: Numbers,
    preservation: Branch | None,
    personalization: Branch | None,
    depth: tuple[float, float] = (1.0, 1.0),
    place: Place = NO_PLACE,
) -> tuple[Branch, ...]:
    """Fold gate, strength and the block's `depth` (one factor per adapter) into the adapters' K and V.

    `outputs`: strength * [gate * Attn(q, Kp, Vp) + (1 - gate) * Attn(q, Ks, Vs)], the factors folded into V.
    `tokens`: strength * Attn(q, K, V) over the scaled tokens [gate * preservation ; (1 - gate) * personalization];
    K and V are linear in the tokens, so the factors fold into both. Tokens scaled to zero still take part in the softmax.
    What depends on the place cannot be folded; the branches carry it along. A block whose depth is 0 gets no branch.
    """
    if mode == "outputs":
        return _outputs(gates, strengths, preservation, personalization, depth, place)
    if not any(depth):
        return ()
    return (_tokens(gates, strengths, preservation, personalization, depth, place),)


def _outputs(
    gates: Numbers,
    strengths: Numbers,
    preservation: Branch | None,
    personalization: Branch | None,
    depth: tuple[float, float],
    place: Place,
) -> tuple[Branch, ...]:
    branches = []
    for branch, of_gate, factor in (
        (preservation, _gate, depth[0]),
        (personalization, _one_minus_gate, depth[1]),
    ):
        if branch is None or not factor:
            continue
        if place.gate is None:
            weights = tuple(strength * of_gate(gate) * factor for gate, strength in _pairs(gates, strengths))
            where = _own_object(place.strength)
        else:
            weights = tuple(strength * factor for strength in strengths)
            where = of_gate(scale(place.gate, gates))
            where = where if place.strength is None else where * place.strength
        branches.append(branch._replace(v=scale(branch.v, weights), place=where))
    return tuple(branches)


def _tokens(
    gates: Numbers,
    strengths: Numbers,
    preservation: Branch | None,
    personalization: Branch | None,
    depth: tuple[float, float],
    place: Place,
) -> Branch:
    pairs = _pairs(gates, strengths)
    parts = []
    for branch, of_gate, factor in (
        (preservation, _gate, depth[0]),
        (personalization, _one_minus_gate, depth[1]),
    ):
        if branch is None:
            continue
        if place.gate is None:
            k = scale(branch.k, tuple(of_gate(gate) for gate in gates))
            v = scale(branch.v, tuple(of_gate(gate) * strength * factor for gate, strength in pairs))
        else:
            k, v = branch.k, scale(branch.v, tuple(strength * factor for strength in strengths))
        parts.append(Branch(k, v, branch.mask))
    joined = Branch(
        torch.cat([part.k for part in parts], dim=1),
        torch.cat([part.v for part in parts], dim=1),
        join_masks(parts),
        _own_object(place.strength),
    )
    if place.gate is None:
        return joined
    count = preservation.k.shape[1] if preservation is not None else 0
    first = (torch.arange(joined.k.shape[1], device=joined.k.device) < count).to(joined.k.dtype).view(-1, 1, 1)
    return joined._replace(place_gate=scale(place.gate, gates), first=first)


def _own_object(t: torch.Tensor | None) -> torch.Tensor | None:
    """torch.compile makes one input of a tensor that it meets twice, and would go on doing so when they differ one day."""
    return None if t is None else t[:]


def _gate(gate):
    return gate


def _one_minus_gate(gate):
    return 1 - gate


def _pairs(gates: Numbers, strengths: Numbers) -> list[tuple[float, float]]:
    count = max(len(gates), len(strengths))
    return list(zip(gates * (count if len(gates) == 1 else 1), strengths * (count if len(strengths) == 1 else 1)))


def scale(t: torch.Tensor, factors: Numbers) -> torch.Tensor:
    """t (b or 1, ...) times one number, or one per row; in float32 then, so that a row gives the same numbers as a run of its own."""
    if all(factor == factors[0] for factor in factors):
        return (t * factors[0]).to(t.dtype)
    factor = torch.tensor(factors, dtype=torch.float32, device=t.device).view(-1, *[1] * (t.dim() - 1))
    return (t * factor).to(t.dtype)


def join_masks(branches: list[Branch]) -> torch.Tensor | None:
    """One mask over the joined tokens; None where every token exists and counts alike."""
    masks = [branch.mask for branch in branches]
    if all(mask is None for mask in masks):
        return None
    rows = max(branch.k.shape[0] for branch in branches)
    if all(mask is None or mask.dtype == torch.bool for mask in masks):
        empty = torch.ones((), dtype=torch.bool)
    else:
        empty = torch.zeros((), dtype=branches[0].k.dtype)
        masks = [None if mask is None else _as_bias(mask, empty.dtype) for mask in masks]
    full = [
        (empty.to(branch.k.device) if mask is None else mask).expand(rows, 1, 1, branch.k.shape[1])
        for mask, branch in zip(masks, branches)
    ]
    return torch.cat(full, dim=3)


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as numbers to add to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def stack_rows(parts: list[Branch]) -> Branch:
    """Stack K, V (b_i, n_i, c) of several conditionings along the batch; shorter ones are padded and the padding masked."""
    longest = max(part.k.shape[1] for part in parts)
    k = torch.cat([_padded(part.k, longest) for part in parts])
    v = torch.cat([_padded(part.v, longest) for part in parts])
    if all(part.mask is None and part.k.shape[1] == longest for part in parts):
        return Branch(k, v)
    masks = [_existing(part, longest) for part in parts]
    if any(mask.dtype != torch.bool for mask in masks):
        masks = [_as_bias(mask, k.dtype) for mask in masks]
    return Branch(k, v, torch.cat(masks))


def _padded(t: torch.Tensor, longest: int) -> torch.Tensor:
    return t if t.shape[1] == longest else torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[1]))


def _existing(part: Branch, longest: int) -> torch.Tensor:
    """(b, 1, 1, longest): which tokens of a padded part exist, or what is added to their scores."""
    rows, count = part.k.shape[:2]
    if part.mask is None:
        return (torch.arange(longest, device=part.k.device) < count).view(1, 1, 1, -1).expand(rows, -1, -1, -1)
    fill = False if part.mask.dtype == torch.bool else -math.inf
    return torch.nn.functional.pad(part.mask.expand(rows, -1, -1, -1), (0, longest - count), value=fill)
