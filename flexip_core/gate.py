"""The gate: pure functions on numbers and tensors (paper section 3.4, "Dynamic Weight Gating").

gate = 1 is all preservation, 0 all personalization. Both gate modes only rescale K and V that are already projected.
"""

from __future__ import annotations

import torch

from .attention import Branch

Scale = "float | torch.Tensor"
"""A number, or one per batch row as (b, 1, 1)."""


def gate_weights(gate: Scale, strength: float) -> tuple[Scale, Scale]:
    """Weights of the preservation and the personalization adapter; they always sum to `strength`."""
    return strength * gate, strength * (1 - gate)


def gated_branches(
    mode: str, gate: Scale, strength: float, preservation: Branch | None, personalization: Branch | None
) -> tuple[Branch, ...]:
    """Fold gate and strength into the adapters' K and V.

    `outputs`: strength * [gate * Attn(q, Kp, Vp) + (1 - gate) * Attn(q, Ks, Vs)], the factors folded into V.
    `tokens`: strength * Attn(q, K, V) over the scaled tokens [gate * preservation ; (1 - gate) * personalization];
    K and V are linear in the tokens, so the factors fold into both. Tokens scaled to zero still take part in the softmax.
    """
    if mode == "outputs":
        weights = gate_weights(gate, strength)
        return tuple(
            (k, scale(v, w), mask)
            for w, branch in zip(weights, (preservation, personalization))
            if branch
            for k, v, mask in [branch]
        )
    scaled = [
        (scale(k, g), scale(v, g * strength), mask)
        for g, branch in ((gate, preservation), (1 - gate, personalization))
        if branch
        for k, v, mask in [branch]
    ]
    keys, values, masks = zip(*scaled)
    return ((torch.cat(keys, dim=1), torch.cat(values, dim=1), join_masks(masks, keys)),)


def scale(t: torch.Tensor, factor: Scale) -> torch.Tensor:
    """In float32 when the factor is per row, so that a row gives the same numbers as a run with that one factor."""
    return (t * factor).to(t.dtype)


def join_masks(masks: tuple, keys: tuple) -> torch.Tensor | None:
    """One mask over the joined tokens; None where every token exists."""
    if all(mask is None for mask in masks):
        return None
    full = [
        torch.ones(k.shape[0], 1, 1, k.shape[1], dtype=torch.bool, device=k.device) if m is None else m
        for m, k in zip(masks, keys)
    ]
    return torch.cat(full, dim=3)


def stack_rows(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> Branch:
    """Stack K, V (b_i, n_i, c) of several conditionings along the batch; shorter ones are padded and the padding masked."""
    longest = max(k.shape[1] for k, _ in parts)
    if all(k.shape[1] == longest for k, _ in parts):
        return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts]), None
    pad = [(0, 0, 0, longest - k.shape[1]) for k, _ in parts]
    mask = torch.cat(
        [
            (torch.arange(longest, device=k.device) < k.shape[1]).view(1, 1, 1, -1).expand(k.shape[0], -1, -1, -1)
            for k, _ in parts
        ]
    )
    keys = torch.cat([torch.nn.functional.pad(k, p) for (k, _), p in zip(parts, pad)])
    values = torch.cat([torch.nn.functional.pad(v, p) for (_, v), p in zip(parts, pad)])
    return keys, values, mask
