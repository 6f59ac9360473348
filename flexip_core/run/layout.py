"""From the rows of a UNet call to what each block adds: K and V stacked, masks laid out, gate and strength folded in."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from ..network.attention import Branch
from ..network.gate import Numbers, Place, gated_branches, stack_rows
from .chain import Call, Gates, Link, Setting, View
from .masks import for_rows, on_grid, on_latent
from .projection import Conditioning
from .reference import combined
from .schedule import GateBatch, GateCurve

Stacked = list[dict[str, Branch]]
"""One block's K and V of all rows, nothing folded in: per branch, by adapter."""


class LinkRow(NamedTuple):
    """One row of a UNet call as one link sees it."""

    conditioning: Conditioning
    item: int  # row of the batch
    latent: int  # the same, counted within one copy of a sweep
    view: View | None
    strengths: tuple[float, ...]  # one per branch of its conditioning

    def gate_at(self, sigma: float | None, setting: Setting) -> float:
        gates = numbers_at(self.conditioning.gates, sigma, setting)
        return gates[self.item % len(gates)]

    def strength_in(self, branch: int) -> float:
        """0 where its conditioning has no such branch."""
        return self.strengths[branch] if branch < len(self.strengths) else 0.0


class Layout(NamedTuple):
    """What one link adds to the UNet calls of one layout."""

    call: Call
    rows: tuple[LinkRow, ...]
    places: tuple[dict[int, Place], ...]  # per branch: level -> the masks on that grid; empty without masks
    stacked: Mapping[str, Stacked]  # by block
    gates: tuple[float, ...] = ()  # of the rows, as folded into `blocks`
    blocks: Mapping[str, tuple[Branch, ...]] = {}

    @property
    def bytes(self) -> int:
        """Of all its tensors, those that stand in several places counted once."""
        parts: Iterable[tuple] = itertools.chain(
            *self.blocks.values(),
            (branch for stacked in self.stacked.values() for part in stacked for branch in part.values()),
            (place for levels in self.places for place in levels.values()),
        )
        tensors = {id(t): t for part in parts for t in part if isinstance(t, torch.Tensor)}
        return sum(t.nbytes for t in tensors.values())


def numbers_at(gates: Gates, sigma: float | None, setting: Setting) -> Numbers:
    """γ as one number, or one per row of the latent batch."""
    if isinstance(gates, GateCurve):
        assert sigma is not None  # Run.reads_sigma
        return (gates(setting.percent_of(sigma)),)
    return gates.values_for(setting.latents) if isinstance(gates, GateBatch) else gates


def laid_out(link: Link, call: Call, setting: Setting, conditionings: list[Conditioning]) -> Layout:
    """All but the gate."""
    strengths = link.strengths or (link.strength,)
    rows = []
    for row in call.rows:
        conditioning, latent = conditionings[row.entry], setting.latent(row.item)
        own = tuple(
            strengths[row.item % len(strengths)] * conditioning.strength_in(branch, latent)
            for branch in range(conditioning.branches)
        )
        rows.append(LinkRow(conditioning, row.item, latent, row.view, own))
    branches = max(row.conditioning.branches for row in rows)
    places = tuple(_places(link, call, setting, rows, branch) for branch in range(branches))
    return Layout(call, tuple(rows), places, {})


def folded(layout: Layout, link: Link, levels: Mapping[str, int], gates: tuple[float, ...], keep: bool) -> Layout:
    """The layout with these gates; with `keep` its K and V stay as they were, too, for other gates."""
    network, depth = link.network, link.depth
    strengths = [tuple(row.strength_in(branch) for row in layout.rows) for branch in range(len(layout.places))]
    stacked, blocks = {}, {}
    for address in network.block_widths:
        factors = (
            (depth["preservation"][address], depth["personalization"][address]) if depth is not None else (1.0, 1.0)
        )
        if not any(factors):
            continue
        parts = layout.stacked.get(address) or _stacked(layout, address, network.adapters)
        if keep:
            stacked[address] = parts
        level = levels.get(address, 0)
        blocks[address] = tuple(
            branch
            for part, strength, place in zip(parts, strengths, layout.places)
            for branch in gated_branches(
                network.gate_mode,
                gates,
                strength,
                part.get("preservation"),
                part.get("personalization"),
                factors,
                place.get(level, Place()),
            )
        )
    return layout._replace(stacked=stacked, gates=gates, blocks=blocks)


def _stacked(layout: Layout, address: str, adapters: Iterable[str]) -> Stacked:
    call, branches = layout.call, len(layout.places)
    out: Stacked = [{} for _ in range(branches)]
    for name in adapters:
        parts = []
        # neighbouring rows of one conditioning go together
        for conditioning, rows in itertools.groupby(layout.rows, key=lambda row: row.conditioning):
            items, latents = zip(*((row.item, row.latent) for row in rows))
            pairs = [tuple(t.to(call.device, call.dtype) for t in part[name][address]) for part in conditioning.kv]
            references = conditioning.references
            found = combined(references.combine, references.weights, pairs, items, latents)
            nothing = Branch(*(torch.zeros_like(t[:1, :1]).expand(len(items), -1, -1) for t in pairs[0]))
            parts.append([*found, *[nothing] * (branches - len(found))])
        for number in range(branches):
            out[number][name] = stack_rows([part[number] for part in parts])
    return out


def has_masks(link: Link, conditionings: Iterable[Conditioning]) -> bool:
    regions = (conditioning.references.masks for conditioning in conditionings)
    return any(mask is not None for mask in (link.mask, link.gate_mask, *regions))


def _places(link: Link, call: Call, setting: Setting, rows: list[LinkRow], branch: int) -> dict[int, Place]:
    if not has_masks(link, (row.conditioning for row in rows)):
        return {}
    shown = None if link.mask is None else _shown(link.mask, rows, call, setting)
    strength = _all_rows_alike(_product(shown, _regions(rows, call, setting, branch)))
    gate = None if link.gate_mask is None else _all_rows_alike(_shown(link.gate_mask, rows, call, setting))

    def on_level(maps: torch.Tensor | None, level: int) -> torch.Tensor | None:
        return None if maps is None else on_grid(maps, level).to(call.device, call.dtype)

    return {level: Place(on_level(strength, level), on_level(gate, level)) for level in set(setting.levels.values())}


def _shown(masks: torch.Tensor, rows: list[LinkRow], call: Call, setting: Setting) -> torch.Tensor:
    """(rows, h, w) of the call's part of each row's mask."""
    whole = on_latent(masks, setting.height, setting.width)
    return for_rows(whole, [row.latent for row in rows], [row.view for row in rows], call.height, call.width)


def _regions(rows: list[LinkRow], call: Call, setting: Setting, branch: int) -> torch.Tensor | None:
    """(rows, h, w) of the masks of "one per region"; 1 in rows whose conditioning has none."""
    masks = [row.conditioning.references.masks for row in rows]
    if all(mask is None for mask in masks):
        return None
    return torch.cat(
        [
            torch.ones(1, call.height, call.width)
            if mask is None or branch >= len(mask)
            else _shown(mask[branch : branch + 1], [row], call, setting)
            for row, mask in zip(rows, masks)
        ]
    )


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a * b


def _all_rows_alike(maps: torch.Tensor | None) -> torch.Tensor | None:
    """One row for all of them where they are equal."""
    return maps if maps is None or len(maps) == 1 or not (maps[1:] == maps[:1]).all() else maps[:1]


def structure(layout: Layout, link: Link, position: int) -> str:
    """What torch.compile must notice: place in the chain, gate mode, and in each block tokens per branch, masks and maps."""
    shapes = {address: "_".join(map(_shape, parts)) for address, parts in layout.blocks.items()}
    distinct = set(shapes.values())
    if len(distinct) == 1 and len(shapes) == len(link.network.block_widths):
        blocks = distinct.pop()
    else:
        blocks = hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest()
    return f"{position}{link.network.gate_mode[0]}{len(shapes)}_{blocks}"


def _shape(branch: Branch) -> str:
    mask = "" if branch.mask is None else "m" if branch.mask.dtype == torch.bool else "b"
    maps = [
        "" if t is None else f"{name}{min(len(t), 2)}" for name, t in (("p", branch.place), ("g", branch.place_gate))
    ]
    return f"{branch.k.shape[1]}{mask}{''.join(maps)}"
