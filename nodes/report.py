"""What a run did, in words: in the log, as progress text on the Apply node, and on FlexIPSampler's report output."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ..flexip_core.run import Link, LinkRun, Run
from . import runtime


def text(run: Run, links: tuple[Link, ...], guider: Any, sigmas: torch.Tensor, seconds: float) -> str:
    """One paragraph per link that took part, warnings last."""
    live = {link_run.position: link_run for link_run in run.links}
    steps = sigmas[:-1].tolist()
    paragraphs = [
        _link(live[position], guider, steps, seconds)
        if position in live
        else f"{link.title}: strength 0, does nothing."
        for position, link in enumerate(links)
    ]
    return "\n\n".join(paragraphs)


def _link(run: LinkRun, guider: Any, steps: list[float], seconds: float) -> str:
    link, counters = run.link, run.counters
    blocks = len(link.network.block_widths)
    lost = runtime.lost_blocks(run, guider.model_options["transformer_options"])
    active_steps = sum(run.active_at(sigma) for sigma in steps)
    lines = [
        f"gate {_numbers(link.gates)}, strength {link.strength:g}: {blocks - len(lost)} of {blocks} blocks patched, {active_steps} of {len(steps)} steps, {seconds:.1f} s",
        f"adapters: {link.title} (gate mode {link.network.gate_mode})",
        f"encoders: {link.reference.encoders}",
        f"reference: {link.reference.count} picture(s), tokens {run.token_counts()}",
        f"active from {link.start_percent:g} to {link.end_percent:g}: {active_steps} of {len(steps)} steps, {counters.active} of {counters.calls} model calls",
        f"K/V: {counters.projected} projected, {counters.from_cache} reused",
    ]
    if counters.untagged:
        lines.append(
            f"note: {counters.untagged} model calls came with a conditioning of another node's own; they got the null reference"
        )
    if lost:
        by = ", ".join(f"{name} x{count}" for name, count in Counter(lost).most_common())
        lines.append(
            f"WARNING: another node took over {len(lost)} of {blocks} blocks after FlexIP ({by}); unless it calls FlexIP, the reference does not act there. Apply FlexIP after that node"
        )
    if hidden := runtime.hidden_neighbours(guider.model_options["transformer_options"]):
        lines.append(
            f"WARNING: {hidden[0]} was put on {len(hidden)} blocks after FlexIP in a way that ComfyUI never calls; apply FlexIP after that node"
        )
    if not counters.active:
        lines.append("WARNING: FlexIP changed nothing in this run; check start_percent and end_percent")
    return ".\n".join(lines)  # full stops, because the page's new nodes show line breaks as spaces


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def publish(report: str, links: tuple[Link, ...], listener: Callable[[str], None] | None) -> None:
    logging.log(logging.WARNING if "WARNING" in report else logging.INFO, "FlexIP\n%s", report)
    if listener is not None:
        listener(report)
    node_id = links[-1].node_id
    if node_id is not None:
        from server import PromptServer  # absent where ComfyUI is used as a library

        if getattr(PromptServer, "instance", None) is not None:
            PromptServer.instance.send_progress_text(report, node_id)
