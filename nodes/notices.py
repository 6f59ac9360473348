"""Where words about a run go: the log, the nodes of the page, and FlexIPSampler's report output."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.v0_0_2 import io
from comfy_execution.utils import get_executing_context

from ..flexip_core.run.chain import Link

WARNING = "WARNING: "
REPORT = "flexip_report"  # key in a node's outputs on the page; web/js/report.js draws it
END = ".\n"  # of a sentence that is followed by others


@dataclass(frozen=True)
class Report:
    """What a node has to say: one plain line, the warnings, and the rest, which the page keeps folded."""

    line: str
    details: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    files: tuple[str, ...] = ()  # the adapters' names by role, of an Apply node
    ends: tuple[str, ...] = ()  # what its gate 0 and 1 are

    @classmethod
    def of(cls, text: str) -> Report:
        """The first sentence or line of a text, and the rest."""
        line, *details = filter(None, re.split(r"\.?\n+", text.strip()))
        return cls(line, tuple(details))

    @classmethod
    def of_chain(cls, reports: Sequence[Report]) -> Report:
        """Of several links of a chain: the line of the last one, which is the one that a sweep changes."""
        details = tuple(
            part for report in reports for part in (*((report.line,) * (len(reports) > 1)), *report.details)
        )
        return cls(reports[-1].line, details, tuple(warning for report in reports for warning in report.warnings))

    @property
    def text(self) -> str:
        """Warnings first."""
        return sentences((*(WARNING + warning for warning in self.warnings), self.line, *self.details))

    @property
    def message(self) -> dict[str, Any]:
        """What web/js/report.js draws."""
        return {**dataclasses.asdict(self), "versions": versions()}


def publish(
    reports: Sequence[Report], links: Sequence[Link], listener: Callable[[Sequence[Report]], None] | None
) -> None:
    """All reports of a chain to the log and to the listener, and each to the Apply node of its link."""
    level = logging.WARNING if any(report.warnings for report in reports) else logging.INFO
    logging.log(level, "FlexIP\n%s", full_text(reports))
    if listener is not None:
        listener(reports)
    for link, report in zip(links, reports):
        send(report, link.node_id)


def full_text(reports: Sequence[Report]) -> str:
    """A paragraph per link."""
    return "\n\n".join(report.text for report in reports)


def sentences(lines: Iterable[str]) -> str:
    """One text of them; with full stops, because the page's own nodes for text show line breaks as spaces."""
    return END.join(lines)


def id_of(node: type[io.ComfyNode]) -> str | None:
    """Of the node on the page whose execute is running; None where there is no page."""
    return node.hidden.unique_id if node.hidden else None


def warn(text: str, node_id: str | None) -> None:
    logging.warning("FlexIP\n" + WARNING + "%s", text)
    _send_warnings(Report("", warnings=(text,)), node_id)


def send(report: Report, node_id: str | None) -> None:
    """Onto a node of the page that another node's execution is about: as an output of its own, which lives as long as pictures do.

    Its warnings are also shown as a badge and a notice (web/js/warnings.js).
    """
    context = get_executing_context()  # None in scripts
    output = {REPORT: report.message}  # not a list: the page would append it to the last run's
    _send("executed", node_id, {"output": output, "prompt_id": context and context.prompt_id, "merge": True})
    _send_warnings(report, node_id)


def said(report: Report | str, node_id: str | None = None) -> dict[str, Any]:
    """For the `ui` of the node that runs: its report as the page draws it, and as text for other programs."""
    text, report = (report, Report.of(report)) if isinstance(report, str) else (report.text, report)
    _send_warnings(report, node_id)
    return {REPORT: [report.message], "text": (text,)}


def _send_warnings(report: Report, node_id: str | None) -> None:
    # sent without warnings, too: that clears those of the last run
    _send("flexip.warnings", node_id, {"warnings": list(report.warnings)})


def _send(event: str, node_id: str | None, message: dict[str, Any]) -> None:
    if node_id is None:
        return
    from server import PromptServer  # absent where ComfyUI is used as a library

    node_id = node_id.partition(".")[0]  # of "5.0.0.3", a node in the graph that node 5 stands for
    server = getattr(PromptServer, "instance", None)
    client = getattr(server, "client_id", None)  # who queued the prompt that runs
    # without a client nobody is waiting, and the server would send it to everybody, whatever their page shows
    if server is not None and client is not None:
        server.send_sync(event, {"node": node_id, **message}, client)


@functools.lru_cache(maxsize=1)
def versions() -> str:
    """One line for reporting a problem; the page adds its own version."""
    from comfyui_version import __version__ as comfyui

    own = re.search(r'^version = "(.*)"', (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"), re.M)
    python = ".".join(map(str, sys.version_info[:3]))
    device = mm.get_torch_device_name(mm.get_torch_device())
    return f"FlexIP {own[1] if own else '?'}, ComfyUI {comfyui}, Python {python}, torch {torch.__version__}, {device}"
