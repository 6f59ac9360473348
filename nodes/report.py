"""What a run did, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from ..flexip_core.run.chain import Link
from ..flexip_core.run.projection import Conditioning
from ..flexip_core.run.reference import as_set
from ..flexip_core.run.run import LinkRun, Run
from .notices import Report
from .slots import hidden_neighbours, lost_blocks

MOST_NUMBERS = 12  # of a schedule or a batch, written out


OFF = "off"
SILENT = "reference not used: strength is 0"


def reports(run: Run, links: tuple[Link, ...], guider: Any, sigmas: torch.Tensor, seconds: float) -> list[Report]:
    """One per link."""
    live = {link_run.position: link_run for link_run in run.links}
    steps = sigmas[:-1].tolist()
    return [
        _link(live[position], guider, steps, seconds) if position in live else silent(link)
        for position, link in enumerate(links)
    ]


def silent(link: Link) -> Report:
    return Report(SILENT, (f"adapters: {link.title}",), files=link.files, ends=ends(link))


def _link(run: LinkRun, guider: Any, steps: list[float], seconds: float) -> Report:
    link, counters = run.link, run.counters
    blocks = [address for address in link.network.block_widths if _acts(link, address)]
    lost = [
        name for address, name in lost_blocks(run, guider.model_options["transformer_options"]) if address in blocks
    ]
    active = [sigma for sigma in steps if run.active_at(sigma)]
    gates = [value for sigma in active for value in run.gates_at(sigma)] or list(
        run.gates_at(steps[0] if steps else 0.0)
    )
    strengths = link.strengths or (link.strength,)
    references = as_set(link.reference)
    warnings = tuple(_warnings(run, blocks, lost, guider))
    acted = counters.active and len(lost) < len(blocks) and not (run.has_masks and not run.mask_is_somewhere())
    line = (
        f"reference used, {_in_short('gate', gates)}, "
        + (f"{_in_short('strength', strengths)}, " if set(strengths) != {1.0} else "")
        + (f"{len(blocks) - len(lost)} of {len(blocks)} blocks, " if lost else "")
        + f"{len(active)} of {len(steps)} steps"
    )
    details = (
        f"gate {_numbers(gates)}, strength {_numbers(strengths)}: {len(blocks) - len(lost)} of {len(link.network.block_widths)} blocks patched, {len(active)} of {len(steps)} steps, {seconds:.1f} s",
        f"adapters: {link.title} (gate mode {link.network.gate_mode})",
        f"encoders: {references.encoders}",
        f"reference: {references.describe()}, tokens {run.token_counts()}",
        f"active from {link.start_percent:g} to {link.end_percent:g}: {len(active)} of {len(steps)} steps, {counters.active} of {counters.calls} model calls",
        f"K/V: {counters.projected} projected, {counters.from_cache} reused",
        *(f"note: {text}" for text in _notes(run)),
    )
    line = line if acted else "reference not used: see the warning"
    return Report(line, details, warnings, link.files, ends(link))


def ends(link: Link) -> tuple[str, str]:
    """What gate 0 and gate 1 are, in a word each."""
    return (OFF, "reference") if len(link.network.adapters) == 1 else ("personalization", "preservation")


def _in_short(name: str, values: Collection[float]) -> str:
    """ "gate 0.60", or "gate 0.00 to 1.00" """
    low, high = min(values), max(values)
    return f"{name} {low:.2f}" + (f" to {high:.2f}" if high > low else "")


def _acts(link: Link, address: str) -> bool:
    return link.depth is None or any(link.depth[name][address] for name in link.network.adapters)


def _notes(run: LinkRun) -> Iterator[str]:
    own = [part for part in run.conditionings if part.own]
    if own:
        yield f"{len(own)} prompt(s) brought their own reference or gate ({'; '.join(map(_gates_of, own))})"
    if run.counters.untagged:
        yield f"{run.counters.untagged} model calls came with a conditioning of another node's own; they got the null reference"


def _warnings(run: LinkRun, blocks: list[str], lost: list[str], guider: Any) -> Iterator[str]:
    if lost:
        by = ", ".join(f"{name} x{count}" for name, count in Counter(lost).most_common())
        yield f"another node took over {len(lost)} of {len(blocks)} blocks after FlexIP ({by}); unless it calls FlexIP, the reference does not act there. Apply FlexIP after that node"
    if hidden := hidden_neighbours(guider.model_options["transformer_options"]):
        yield f"{hidden[0]} was put on {len(hidden)} blocks after FlexIP in a way that ComfyUI never calls; apply FlexIP after that node"
    if run.counters.tiles:
        yield f"{run.counters.tiles} model calls showed a tile without saying which, so the mask was laid over each tile; use a mask only without that tiling"
    if run.has_masks and not run.mask_is_somewhere():
        yield "the mask is black everywhere, so this gate changed nothing; paint white where the reference should act"
    if not run.counters.active:
        yield "this gate changed nothing in this run; check start_percent and end_percent"
    elif not blocks:
        yield "this gate changed nothing in this run, because every block has strength 0; check the blocks"


def _gates_of(conditioning: Conditioning) -> str:
    gates = conditioning.gates
    return f"gate {_numbers(gates)}" if isinstance(gates, tuple) else "gate by a schedule"


def _numbers(values: Iterable[float]) -> str:
    numbers = list(dict.fromkeys(f"{round(value, 3):g}" for value in values))
    return ", ".join(numbers if len(numbers) <= MOST_NUMBERS else [*numbers[: MOST_NUMBERS - 1], "...", numbers[-1]])
