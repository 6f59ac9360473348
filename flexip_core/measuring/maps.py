"""Attention maps (paper Fig. 7): where in the picture a group of tokens acts.

For the tokens of the adapters a map is the size of what the group adds at each place: the norm over the channels of
sum_{j in group} a_j V_j, with gate, strength and masks, in units of what the text's own attention adds on average in that block.
The attention a_j alone would not be enough: in gate mode `outputs` the tokens of an adapter share a softmax of their own, so that their
attention sums to 1 everywhere, whatever the gate. For words it is the attention that the text's softmax gives to their tokens.

Shape legend: b rows of a UNet call, n image tokens (gh * gw), t text tokens, m adapter tokens, c channels, g groups of tokens,
h x w what a call shows of the latent H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..network.adapters import ADAPTERS
from ..network.attention import Branch, attention, decoupled_attention
from ..run.chain import Branches, Link, Row
from ..run.lists import blocks_under, split_list
from ..run.run import LinkRun

CHUNK = 2**24  # attention weights held at once: 64 MB


class Block(NamedTuple):
    """One text cross-attention during one UNet call, as its patch sees it."""

    address: str
    q: torch.Tensor  # (b, n, c)
    k: torch.Tensor  # (b, t, c), of the text
    v: torch.Tensor
    heads: int
    grid: tuple[int, int]
    rows: tuple[Row, ...]
    branches: Branches  # what FlexIP adds


Picked = list[tuple[Branch, list[int]]]
"""Branches of a block, and which of their tokens belong to a group."""
Measure = Callable[[Sequence[LinkRun], Block], torch.Tensor | None]
"""A block's maps (b, g, n), or None where nothing acts."""


def choose_blocks(text: str, addresses: Sequence[str]) -> tuple[str, ...]:
    """ "output, middle.0.3" -> the model's addresses that begin so, part by part; "all" is every one."""
    chosen: set[str] = set()
    for name in split_list(text.lower()):
        covered = addresses if name == "all" else blocks_under(name, addresses)
        if not covered:
            blocks = ", ".join(dict.fromkeys(address.rpartition(".")[0] for address in addresses))
            raise ValueError(
                f"blocks names {name[:60]!r}, where this model has no cross-attention; its blocks are {blocks}. "
                "Write some of them, their beginnings such as output, or all."
            )
        chosen.update(covered)
    if not chosen:
        raise ValueError("blocks is empty. Write all, or blocks such as output or input.4, with commas between them.")
    return tuple(address for address in addresses if address in chosen)


def adapter_groups(links: Sequence[Link]) -> dict[tuple[int, str], str]:
    """(position in the chain, group of tokens) -> label, for every link that acts; numbered where there are several."""
    acting = [(position, link) for position, link in enumerate(links) if not link.silent]
    return {
        (position, group): group if len(acting) == 1 else f"{position + 1} {group}"
        for position, link in acting
        for adapter in ADAPTERS
        if adapter in link.network.adapters
        for group in link.network.token_groups(adapter, 0)
    }


def measure_adapters(groups: Sequence[tuple[int, str]]) -> Measure:
    """What each group of adapter_groups adds."""

    def measure(runs: Sequence[LinkRun], block: Block) -> torch.Tensor | None:
        picked: dict[tuple[int, str], Picked] = {group: [] for group in groups}
        for run in runs:
            for adapter, branch, first, count in _parts(run, block):
                for name, tokens in run.link.network.token_groups(adapter, count).items():
                    picked[run.position, name].append((branch, [first + token for token in tokens]))
        return shares_added(block, list(picked.values()))

    return measure


def measure_words_added(words: Sequence[Sequence[int]], text: int) -> Measure:
    """What the personalization tokens of each word add, all links together; `text` tokens is the prompt's conditioning long."""

    def measure(runs: Sequence[LinkRun], block: Block) -> torch.Tensor | None:
        picked: list[Picked] = [[] for _ in words]
        for run in runs:
            for adapter, branch, first, count in _parts(run, block):
                if run.link.network.reads_text(adapter):
                    for into, word in zip(picked, words):
                        # several references bring a token per text token each; what pads them is masked
                        into.append((branch, [first + i for i in _repeated(word, text, count)]))
        return shares_added(block, picked)

    return measure


def measure_words(words: Sequence[Sequence[int]], text: int) -> Measure:
    """The attention that the tokens of each word get from the text's own softmax, averaged over the heads."""

    def measure(runs: Sequence[LinkRun], block: Block) -> torch.Tensor:
        weights = attention_weights(block.q, block.k, block.heads)
        # core repeats a shorter text to the length of the longest in the call
        indices = [_repeated(word, text, block.k.shape[1]) for word in words]
        return torch.stack([weights[..., index].sum(dim=-1) for index in indices], dim=1)

    return measure


def _repeated(word: Sequence[int], period: int, count: int) -> list[int]:
    return [copy * period + token for copy in range(count // period) for token in word]


def _parts(run: LinkRun, block: Block) -> Iterator[tuple[str, Branch, int, int]]:
    """What each token of a link's branches belongs to: (adapter, branch, first token, tokens), in the order of gated_branches."""
    network, depth = run.link.network, run.link.depth
    branches = block.branches.get((run.position, block.address), ())
    if network.gate_mode == "tokens":  # both adapters in one branch
        for number, branch in enumerate(branches):
            # of the row with the most of them; the others are padded
            count = max(
                run.conditionings[row.entry].tokens_in("preservation", number, run.setting.latent(row.item))
                for row in block.rows
            )
            yield "preservation", branch, 0, count
            yield "personalization", branch, count, branch.k.shape[1] - count
        return
    acting = [
        adapter
        for adapter in ADAPTERS
        if adapter in network.adapters and (depth is None or depth[adapter][block.address])
    ]
    for number, branch in enumerate(branches):
        yield acting[number % len(acting)], branch, 0, branch.k.shape[1]


def shares_added(block: Block, groups: Sequence[Picked]) -> torch.Tensor | None:
    """(b, g, n): how much each group adds at each place, where 1 is what the text adds on average in this block."""
    if not any(groups):
        return None
    unit = _size(attention(block.q, block.k, block.v, block.heads)).mean(dim=1, keepdim=True)  # (b, 1)
    sizes = [_size(added_by(block.q, picked, block.heads, block.grid)) / unit for picked in groups]
    return torch.stack(sizes, dim=1).nan_to_num(0.0, 0.0, 0.0)


def added_by(q: torch.Tensor, picked: Picked, heads: int, grid: tuple[int, int] | None) -> torch.Tensor:
    """(b, n, c): what these tokens add. They keep their share of the softmax; V of the others is taken out."""
    only = tuple(branch._replace(v=_only(branch.v, tokens)) for branch, tokens in picked)
    return decoupled_attention(torch.zeros_like(q), q, only, heads, grid)


def _only(v: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    kept = torch.zeros(v.shape[1], 1, dtype=v.dtype)
    kept[list(tokens)] = 1
    return v * kept.to(v.device)


def _size(t: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32)


def attention_weights(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q kT / sqrt(d)) of q (b, n, c), k (b, t, c), averaged over the heads: (b, n, t). A few queries at a time."""
    b = q.shape[0]
    q, k = (t.view(b, t.shape[1], heads, -1).transpose(1, 2) for t in (q, k))  # b h n|t d
    k = k.float().transpose(2, 3)
    scale = q.shape[-1] ** -0.5
    chunks = q.split(max(1, CHUNK // (b * heads * k.shape[3])), dim=2)
    return torch.cat([torch.softmax(chunk.float() @ k * scale, dim=-1).mean(dim=1) for chunk in chunks], dim=1)


class MapMean:
    """The mean of many maps of a latent batch, on the CPU: over blocks, noise levels, and parts of the picture that overlap."""

    def __init__(self, groups: int, batch: int, height: int, width: int):
        self._sum = torch.zeros(batch, groups, height, width)
        self._weight = torch.zeros(batch, 1, height, width)

    def add(
        self,
        maps: torch.Tensor,
        rows: Sequence[Row],
        height: int,
        width: int,
        weights: Mapping[int, torch.Tensor],
    ) -> bool:
        """maps (b, g, gh, gw) of a call that showed height x width; `weights`: entry -> (batch, H, W), how much it counts where.

        False if no row could be placed.
        """
        placed = False
        for row, shown in zip(rows, on_latent(maps, height, width).cpu()):
            if row.view is not None:
                ys, xs = (torch.tensor(places) for places in row.view)
            elif (height, width) == self._sum.shape[-2:]:
                ys, xs = torch.arange(height), torch.arange(width)
            else:
                continue  # a tile of another node that does not say which
            if row.entry not in weights:
                continue
            weight = weights[row.entry][row.item][ys[:, None], xs]
            self._sum[row.item][:, ys[:, None], xs] += shown * weight
            self._weight[row.item][:, ys[:, None], xs] += weight
            placed = True
        return placed

    def result(self) -> torch.Tensor:
        """(g, batch, H, W); 0 where nothing was seen."""
        return (self._sum / self._weight.clamp_min(1e-12)).transpose(0, 1)


def on_latent(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(b, g, gh, gw) -> (b, g, height, width), bilinear. A token stands over side x side latent cells from the top left."""
    for side in (1, 2, 4, 8, 16):
        if (-(-height // side), -(-width // side)) == maps.shape[-2:]:
            return F.interpolate(maps, scale_factor=side, mode="bilinear")[..., :height, :width]
    return F.interpolate(maps, size=(height, width), mode="bilinear")  # a neighbour runs the block at another size


class Word(NamedTuple):
    text: str
    tokens: tuple[int, ...]  # places in the conditioning


def every_word(words: Sequence[Word]) -> dict[str, list[int]]:
    """Word -> tokens of all its occurrences, without punctuation."""
    out: dict[str, list[int]] = {}
    for word in words:
        if any(letter.isalnum() for letter in word.text):
            out.setdefault(word.text, []).extend(word.tokens)
    return out


def chosen_words(words: Sequence[Word], wanted: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Label -> tokens of all occurrences of these words, which stand together in the prompt."""
    texts = [word.text for word in words]
    out = {}
    for label, parts in wanted.items():
        starts = [i for i in range(len(texts)) if parts and texts[i : i + len(parts)] == list(parts)]
        if not starts:
            known = ", ".join(every_word(words))
            raise ValueError(f"words has {label!r}, which is not in the prompt; its words are {known}.")
        out[label] = [token for i in starts for word in words[i : i + len(parts)] for token in word.tokens]
    return out


def split_words(text: str) -> list[str]:
    """ "cat, red hat" -> ["cat", "red hat"]"""
    return list(dict.fromkeys(" ".join(part.split()) for part in split_list(text)))
