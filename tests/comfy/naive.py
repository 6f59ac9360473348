"""A naive reference for what tiny.py's cannot do: masks, depth, many references, gates along sampling or batch, own prompts.

It knows nothing of tags, runs, branches or caches. At every call of every block it finds out which prompt a row carries from the
row's projected keys, lays the masks over the block's tokens cell by cell in plain loops, recomputes K and V, and does every softmax
by hand, row by row.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.ldm.modules.attention
import tiny
import torch
from flexip_pack.flexip_core.network.blocks import cross_attentions
from flexip_pack.flexip_core.pictures.crop import as_masks
from flexip_pack.flexip_core.run.chain import Link
from flexip_pack.flexip_core.run.reference import Reference, ReferenceSet

Box = tuple[int, int, int, int]  # top, left, height, width, in latent cells
Shown = tuple[list[int], list[int]]  # the latent's rows and columns


@dataclass(eq=False, repr=False)
class Spec:
    """One link, in the words of the naive reference. `gates`: numbers in turn along the batch, or a function of the percent."""

    network: Any
    references: Sequence[Reference]
    gates: Sequence[float] | Callable[[float], float] = (0.6,)
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    mask: torch.Tensor | None = None  # (m, h, w)
    gate_mask: torch.Tensor | None = None
    depth: dict[str, dict[str, float]] | None = None
    combine: str = "concatenate"
    weights: Sequence[float] = ()
    regions: torch.Tensor | None = None
    negative: Reference | None = None

    def reference(self) -> Reference | ReferenceSet:
        """For the product."""
        if len(self.references) == 1 and not self.weights and self.negative is None and self.regions is None:
            return self.references[0]
        weights = tuple(self.weights) or (1.0,) * len(self.references)
        return ReferenceSet(tuple(self.references), weights, self.combine, self.regions, self.negative)

    def link(self, gates: Any = None) -> Link:
        """What the product gets; `gates` where a function has to be one of its classes."""
        link = tiny.link_for(
            self.network,
            self.reference(),
            strength=self.strength,
            start_percent=self.window[0],
            end_percent=self.window[1],
            mask=None if self.mask is None else as_masks(self.mask, "mask"),
            gate_mask=None if self.gate_mask is None else as_masks(self.gate_mask, "gate mask"),
            depth=self.depth,
        )
        return replace(link, gates=tuple(self.gates) if gates is None else gates)


@dataclass
class Prompt:
    """A text of the run: its role, the area of the latent that it is shown, and per link what it brings along.

    `own`: position in the chain -> a Spec as "reference", "gates" in place of the link's, a "strength" that multiplies.
    """

    text: torch.Tensor  # (t, w)
    null: bool
    area: Box | None = None
    own: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Picture:
    """What every row of a call shows; a test that cuts or reorders rows itself says so in `row`."""

    batch: int
    height: int
    width: int
    row: Callable[[int], tuple[int, Shown | None]] | None = None  # row of the call -> latent, what it shows (None: all)

    def __call__(self, options: dict, row: int, rows: int, prompt: Prompt) -> tuple[int, list[int], list[int]]:
        """Row of the latent batch, and the latent's rows and columns that are shown."""
        whole = [list(range(self.height)), list(range(self.width))]
        if self.row is not None:
            item, shown = self.row(row)
            return item, *(shown or whole)
        window = options.get("context_window")
        if window is not None:
            anchor = getattr(window, "causal_anchor_index", None)
            shown = ([] if anchor is None or anchor < 0 else [anchor]) + list(window.index_list)
            if window.dim == 0:
                return shown[row % len(shown)], *whole
            whole[window.dim - 2] = shown
            return row % self.batch, *whole
        item = row % (rows // len(options["cond_or_uncond"]))
        if list(options["original_shape"][-2:]) != [self.height, self.width]:
            return item, *sides(prompt.area)
        return item, *whole


def sides(box: Box) -> Shown:
    top, left, height, width = box
    return list(range(top, top + height)), list(range(left, left + width))


def attach(model, specs: Sequence[Spec], prompts: Sequence[Prompt], picture: Picture):
    """A clone of `model` with one naive Block per cross-attention. Negative areas that core makes are told by the call's size."""
    model = model.clone()
    sampling = model.get_model_object("model_sampling")
    levels = _levels(model)
    for address, attn2 in cross_attentions(model.model.diffusion_model).items():
        kind, number, index = address.split(".")
        block = Block(address, levels[address], attn2, sampling, specs, prompts, picture)
        model.set_model_attn2_replace(block, kind, int(number), transformer_index=int(index))
    return model


def _levels(model) -> dict[str, int]:
    """The tiny model halves once, between input.1 and input.3, and doubles after output.1."""
    at_full_size = {"input.1.0", "output.2.0", "output.3.0", "output.3.1"}
    return {address: int(address not in at_full_size) for address in cross_attentions(model.model.diffusion_model)}


class Block:
    def __init__(self, address, level, attn2, sampling, specs, prompts, picture):
        self.address, self.level, self.attn2, self.sampling = address, level, attn2, sampling
        self.specs, self.prompts, self.picture = specs, prompts, picture
        self.known: dict[Any, dict[str, torch.Tensor]] = {}  # the adapters' tokens, which are slow and not in question

    def __call__(self, q, k, v, extra_options):
        heads = extra_options["n_heads"]
        out = comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)
        sigma = float(extra_options["sigmas"][0])
        added = torch.zeros_like(out)
        for row in range(q.shape[0]):
            prompt = self.match(k[row], row)
            shown = self.picture(extra_options, row, q.shape[0], prompt)
            for position, spec in enumerate(self.specs):
                start, end = (self.sampling.percent_to_sigma(percent) for percent in spec.window)
                if end <= sigma <= start:
                    added[row] += self.addition(position, spec, q[row], heads, prompt, sigma, *shown)
        return out + added

    def match(self, key: torch.Tensor, row: int) -> Prompt:
        for prompt in self.prompts:
            count = prompt.text.shape[0]
            if key.shape[0] % count == 0 and torch.allclose(self.attn2.to_k(prompt.text), key[:count], atol=1e-4):
                return prompt
        raise AssertionError("a row carries a text that the test did not declare")

    def addition(self, position, spec, q, heads, prompt, sigma, item, rows, columns) -> torch.Tensor:
        own = prompt.own.get(position, {})
        strength = spec.strength * own.get("strength", 1.0)
        gates = own.get("gates", spec.gates)
        gate = gates(percent_of(sigma, self.sampling)) if callable(gates) else gates[item % len(gates)]
        on_tokens = lambda *masks: token_values(masks, item, self.picture, rows, columns, self.level)
        gate_where = on_tokens(spec.gate_mask)
        gates_of_tokens = torch.full((q.shape[0], 1), gate) if gate_where is None else gate * gate_where
        total = torch.zeros_like(q)
        chosen = own.get("reference", spec)  # another Spec's references, weights and so on
        for references, shares, factor, region in _groups(chosen, item):
            where = on_tokens(spec.mask, region)
            amount = strength * factor * (torch.ones(q.shape[0], 1) if where is None else where)
            sources = [_features(reference, chosen.negative, prompt.null) for reference in references]
            if chosen.combine == "average":
                tokens = [mean_tokens([self.tokens(spec.network, f, prompt) for f in sources], shares)]
                shares = [1.0]
            else:
                tokens = [self.tokens(spec.network, features, prompt) for features in sources]
            total += amount * weighed(spec, self.address, q, heads, tokens, shares, gates_of_tokens)
        return total

    def tokens(self, network, features: dict[str, torch.Tensor], prompt: Prompt) -> dict[str, torch.Tensor]:
        key = network, id(features), id(prompt)
        if key not in self.known:
            self.known[key] = {name: network.tokens(name, features, prompt.text[None])[0] for name in network.adapters}
        return self.known[key]


def _groups(spec: Spec, item: int):
    """(references in one softmax, their weights in it, factor of the strength, region) for each softmax."""
    weights = spec.weights or [1.0] * len(spec.references)
    if spec.combine == "one per region":
        return [
            ([reference], [1.0], weight, region[None])
            for reference, weight, region in zip(spec.references, weights, spec.regions)
        ]
    if spec.combine == "one per batch item":
        number = item % len(spec.references)
        return [([spec.references[number]], [1.0], weights[number], None)]
    return [(spec.references, weights, 1.0, None)]


def _features(reference: Reference, negative: Reference | None, null: bool) -> dict[str, torch.Tensor]:
    if null:
        return reference.null if negative is None else negative.features
    return reference.features


def mean_tokens(every: list[dict[str, torch.Tensor]], shares: Sequence[float]) -> dict[str, torch.Tensor]:
    return {name: sum(t[name] * (w / sum(shares)) for t, w in zip(every, shares)) for name in every[0]}


def weighed(spec, address, q, heads, tokens, shares, gates) -> torch.Tensor:
    """What both adapters add at strength 1: q (n, c), gates (n, 1), `tokens` and their `shares` per reference."""
    depth = spec.depth or {name: {address: 1.0} for name in spec.network.adapters}
    scores, values, share, of_gate = {}, {}, {}, {"preservation": gates, "personalization": 1 - gates}
    for name in of_gate:
        kv = spec.network.projection(address, name)
        joined = torch.cat([t[name] for t in tokens])
        scores[name] = by_head(q, heads) @ by_head(joined @ kv.to_k.weight.T, heads).mT / (q.shape[1] // heads) ** 0.5
        values[name] = depth[name][address] * by_head(joined @ kv.to_v.weight.T, heads)
        share[name] = torch.cat([torch.full((len(t[name]),), float(w)) for t, w in zip(tokens, shares)])
    if spec.network.gate_mode == "outputs":
        added = [gate * weights(scores[name], share[name]) @ values[name] for name, gate in of_gate.items()]
    elif not any(depth[name][address] for name in of_gate):
        return torch.zeros_like(q)
    else:
        scaled = torch.cat([gate * scores[name] for name, gate in of_gate.items()], dim=2)
        parts = weights(scaled, torch.cat(list(share.values()))).split([len(s) for s in share.values()], dim=2)
        added = [part * gate @ values[name] for part, (name, gate) in zip(parts, of_gate.items())]
    return sum(added).transpose(0, 1).flatten(1)


def by_head(t: torch.Tensor, heads: int) -> torch.Tensor:
    """(n, c) -> (heads, n, c / heads)"""
    return t.unflatten(1, (heads, -1)).transpose(0, 1)


def weights(scores: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in which token j counts `share[j]` times."""
    each = share * (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return each / each.sum(dim=-1, keepdim=True)


# Masks: lists of rows of numbers.


def token_values(masks, item, picture: Picture, rows, columns, level) -> torch.Tensor | None:
    """(tokens, 1): the product of this latent's masks over the tokens of a block, row by row; None without masks."""
    own = [mask[item % len(mask)] for mask in masks if mask is not None]
    if not own:
        return None
    cells = [[1.0] * len(columns) for _ in rows]
    for mask in own:
        latent = _on_latent(mask.numpy().tobytes(), mask.shape, picture.height, picture.width)
        cells = [[value * latent[r][c] for value, c in zip(line, columns)] for line, r in zip(cells, rows)]
    return torch.tensor(on_tokens(cells, level)).view(-1, 1)


@functools.cache
def _on_latent(data: bytes, shape, height, width) -> list[list[float]]:
    return on_latent(torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape).tolist(), height, width)


def on_latent(mask: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Every latent cell gets the mean of the mask's pixels that it touches."""
    lines, spots = touched(len(mask), height), touched(len(mask[0]), width)
    return [[mean([mask[r][c] for r in line for c in spot]) for spot in spots] for line in lines]


def touched(pixels: int, cells: int) -> list[range]:
    return [range(i * pixels // cells, math.ceil((i + 1) * pixels / cells)) for i in range(cells)]


def on_tokens(cells: list[list[float]], level: int) -> list[list[float]]:
    """A token stands over 2^level x 2^level latent cells, the last ones over what is left."""
    side = 2**level
    starts = [range(0, length, side) for length in (len(cells), len(cells[0]))]
    return [
        [mean([v for line in cells[r : r + side] for v in line[c : c + side]]) for c in starts[1]] for r in starts[0]
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# Time


def percent_of(sigma: float, sampling) -> float:
    """Where percent_to_sigma reaches a sigma, by halving."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sampling.percent_to_sigma(middle) > sigma else (low, middle)
    return (low + high) / 2


def lines(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Straight lines through points (percent, gate), constant outside."""

    def gate(percent: float) -> float:
        if percent <= points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if percent <= x1:
                return y0 + (y1 - y0) * (percent - x0) / (x1 - x0)
        return points[-1][1]

    return gate


# Watching a run of the product


def watch_blocks(model, look: Callable[[str, torch.Tensor, torch.Tensor, tuple[int, int]], None]):
    """A clone in which every block shows its address, its output and that of its bare text attention, and its token grid."""
    model = model.clone()
    slots = model.model_options["transformer_options"]["patches_replace"]["attn2"]

    def see(out, q, k, v, extra_options, address):
        bare = comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"])
        look(address, out, bare, tuple(extra_options["activations_shape"][-2:]))
        return torch.zeros_like(out)

    for patch in {id(patch): patch for patch in slots.values()}.values():
        patch.add(see, address=patch.address)
    return model


def watch_calls(model, look: Callable[[float, dict], None]):
    """A clone in which every UNet call shows its sigma and the pack's tensors ({} where nothing acts)."""
    model = model.clone()

    def see(executor, *args, **kwargs):
        look(float(args[5]["sigmas"][0]), args[5].get("flexip", {}))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "watch", see)
    return model
