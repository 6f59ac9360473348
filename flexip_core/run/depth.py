"""The gate over depth: how strongly each adapter acts in each block of the UNet, as a preset or a free list of addresses.

What an artist chose (BlockStrengths) is checked at once, but is applied to a model only later: `levels` maps the model's block addresses
("input.4.0": kind, number, transformer index) to how often the latent is halved there, as unet.block_levels finds it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..network.adapters import ADAPTERS
from .lists import blocks_under, split_list

NODE = "FlexIPBlocks"  # named in every message: a list may fail only at the node that applies it to a model
PRESETS = ("all", "composition only", "style only", "coarse", "fine")
LIST = "list"
STRONGEST = 5.0

Levels = Mapping[str, int]
_ENTRY = re.compile(r"(all|(?:input|middle|output)(?:\.[0-9]+){0,2})\s*[=＝]\s*(\S+)")


@dataclass(frozen=True)
class Spec:
    """One adapter's strengths over depth: one of PRESETS, or LIST with its entries (address or its beginning, strength)."""

    choice: str
    entries: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class BlockStrengths:
    """What travels on the socket FLEXIP_BLOCKS."""

    preservation: Spec
    personalization: Spec

    def resolve(self, levels: Levels) -> dict[str, dict[str, float]]:
        """Adapter -> block address -> factor of the strength, for every block of the model."""
        return {adapter: _resolve(getattr(self, adapter), levels, f"{NODE}: {adapter}") for adapter in ADAPTERS}

    def in_words(self, levels: Levels) -> list[str]:
        """One sentence per adapter, "preservation: 1 in output.1; 0.5 in input.4, input.5; 0 elsewhere"."""
        lines = []
        for adapter, strengths in self.resolve(levels).items():
            groups: dict[float, list[str]] = {}
            for address, strength in strengths.items():
                groups.setdefault(strength, []).append(address)
            parts = [f"{s:g} in {_names(groups[s], levels)}" for s in sorted(groups, reverse=True) if s]
            lines.append(f"{adapter}: {'; '.join(parts + ['0 elsewhere'] * (0.0 in groups))}")
        return lines


def spec(adapter: str, choice: str, text: str) -> Spec:
    """One of PRESETS, or LIST; only LIST reads `text`."""
    if choice == LIST:
        return Spec(LIST, parse(text, f"{NODE}: {adapter}_list"))
    if choice not in PRESETS:
        raise ValueError(
            f"{NODE}: {adapter} {choice!r} is not a preset. Choose one of {', '.join(PRESETS)}, or {LIST}."
        )
    return Spec(choice)


def parse(text: str, where: str) -> tuple[tuple[str, float], ...]:
    """ "input.4=0.5, output=1" -> (("input.4", 0.5), ("output", 1.0)). Commas, semicolons and new lines separate.

    `where` begins the message of an error: "FlexIPBlocks: preservation_list".
    """
    entries = tuple(_entry(part, where) for part in split_list(text.lower()))
    if not entries:
        raise ValueError(f"{where} is empty. Write at least one block and its strength, such as output.1=1, all=0.")
    return entries


def _entry(text: str, where: str) -> tuple[str, float]:
    match = _ENTRY.fullmatch(text)
    strength = _number(match[2]) if match else math.nan
    if match is None or not 0.0 <= strength <= STRONGEST:
        raise ValueError(
            f"{where} has {text[:60]!r}, which is not a block and a strength from 0 to {STRONGEST:g}. "
            "Write entries such as input.4=0.5, output=1, middle.0.3=0 or all=0.2, with commas between them."
        )
    return match[1], strength


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _resolve(chosen: Spec, levels: Levels, where: str) -> dict[str, float]:
    if chosen.choice == LIST:
        return _by_list(chosen.entries, levels, f"{where}_list")
    if chosen.choice == "all":
        return dict.fromkeys(levels, 1.0)
    if chosen.choice in ("coarse", "fine"):
        kept = _half(chosen.choice, levels, where)
        return {address: float(level in kept) for address, level in levels.items()}
    factors = _known(chosen.choice, levels) or _structural(chosen.choice, levels, where)
    return {address: factors.get(_block(address), 0.0) for address in levels}


def _by_list(entries: tuple[tuple[str, float], ...], levels: Levels, where: str) -> dict[str, float]:
    """An entry covers every address that begins with it, part by part; later entries win. `all` is for blocks that no entry names."""
    strengths = dict.fromkeys(levels, dict(entries).get("all", 1.0))
    unknown = []
    for name, strength in entries:
        covered = blocks_under(name, levels)
        strengths.update(dict.fromkeys(covered, strength))
        if not covered and name != "all":
            unknown.append(name)
    if unknown:
        known = ", ".join(name for block, own in _by_block(levels).items() for name in _runs(block, own))
        raise ValueError(
            f"{where} names {', '.join(dict.fromkeys(unknown))}, where this model has no cross-attention; its blocks are {known}."
        )
    return strengths


def _half(choice: str, levels: Levels, where: str) -> set[int]:
    """The distinct levels with cross-attention, cut in two: coarse is the deeper half and gets the odd one."""
    distinct = sorted(set(levels.values()))
    if len(distinct) < 2:
        raise ValueError(
            f"{where} is {choice!r}, but all cross-attention blocks of this model work at the same size, so there is no coarse or fine half. "
            f"Choose another preset, or {LIST}."
        )
    middle = len(distinct) // 2
    return set(distinct[middle:] if choice == "coarse" else distinct[:middle])


# Which blocks carry layout and which style, block by block ("kind.number" -> factor; all other blocks 0).
#
# SDXL. InstantStyle (arXiv 2404.02733; InstantStyle/InstantStyle f692735, README): "up blocks.0.attentions.1 and down
# blocks.2.attentions.1 capture style (color, material, atmosphere) and spatial layout (structure, composition)". In ComfyUI's
# addresses output.1 and input.8. IPAdapter_plus and diffusers' set_ip_adapter_scale examples use the same two. SSD-1B and Vega
# have the same blocks.
#
# SD1.5 (and SD2, which has the same blocks). Its own authors call it "experimental, not obvious as SDXL" (InstantStyle
# f692735, infer_style_sd15.py: style up_blocks.1 = output.3 to 5; style and layout down_blocks.2, mid_block, up_blocks.1).
# They give no layout alone, so the numbers are those that artists use: IPAdapter_plus 9d076a3 (IPAdapterPlus.py, "style
# transfer" and "composition", by one of InstantStyle's authors; unchanged since 2024-04, copied by sd-webui-controlnet), where
# cross-attentions are counted in the order of execution: composition {4: 0.25, 5: 1}, style {0 to 3, 9 to 15: 1}.
_SD15_STYLE = ["input.1", "input.2", "input.4", "input.5", *(f"output.{number}" for number in range(5, 12))]
_KNOWN = (
    (
        {f"input.{number}" for number in (4, 5, 7, 8)} | {f"output.{number}" for number in range(6)},
        {"composition only": {"input.8": 1.0}, "style only": {"output.1": 1.0}},
    ),
    (
        {f"input.{number}" for number in (1, 2, 4, 5, 7, 8)} | {f"output.{number}" for number in range(3, 12)},
        {"composition only": {"input.7": 0.25, "input.8": 1.0}, "style only": dict.fromkeys(_SD15_STYLE, 1.0)},
    ),
)


def _known(choice: str, levels: Levels) -> dict[str, float] | None:
    blocks = {block for block in _by_block(levels) if not block.startswith("middle")}  # distilled models leave it out
    return next((presets[choice] for known, presets in _KNOWN if known == blocks), None)


def _structural(choice: str, levels: Levels, where: str) -> dict[str, float]:
    """For any other UNet, what the two known ones have in common.

    Layout: the last cross-attention block on the way down (input.8 in both). Style: the deepest level on the way up
    (InstantStyle's up_blocks.1 of SD1.5; its block of SDXL is one of the three there).
    """
    kind = "input" if choice == "composition only" else "output"
    side = {_block(address): level for address, level in levels.items() if address.startswith(f"{kind}.")}
    if not side:
        raise ValueError(
            f"{where} is {choice!r}, but this model has no cross-attention in its {kind} blocks. Choose another preset, or {LIST}."
        )
    deepest = [block for block, level in side.items() if level == max(side.values())]
    return dict.fromkeys(deepest[-1:] if kind == "input" else deepest, 1.0)


def _block(address: str) -> str:
    """ "input.4.0" -> "input.4" """
    return address.rpartition(".")[0]


def _by_block(addresses: Iterable[str]) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {}
    for address in addresses:
        blocks.setdefault(_block(address), []).append(address)
    return blocks


def _names(addresses: list[str], levels: Levels) -> str:
    """A block with all of its addresses in `levels` by its own name, single transformers as "input.4.0-1"."""
    if len(addresses) == len(levels):
        return "every block"
    whole, names = _by_block(levels), []
    for block, own in _by_block(addresses).items():
        names += [block] if own == whole[block] else _runs(block, own)
    return ", ".join(names)


def _runs(block: str, addresses: list[str]) -> list[str]:
    numbers = [int(address.rpartition(".")[2]) for address in addresses]
    runs = [list(run) for _, run in itertools.groupby(numbers, key=lambda n: n - numbers.index(n))]
    return [f"{block}.{run[0]}" + (f"-{run[-1]}" if len(run) > 1 else "") for run in runs]
