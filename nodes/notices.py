"""Where words about a run go: the log, the node in the page, and FlexIPSampler's report output."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence

from comfy_api.v0_0_2 import io

from ..flexip_core.run.chain import Link

WARNING = "WARNING: "
# what begins a tag, an entity, a link of the page's own kind (and its stand-in), or joins the two halves of a Markdown link
_MARKUP = re.compile(r"<(?=[a-zA-Z/!?])|&(?=[a-zA-Z#])|\[(?=\[)|__LNK(?=\d)|\](?=[(\[:])")
_ZERO_WIDTH_SPACE = "\u200b"
END = ".\n"  # of a sentence that others follow


def publish(paragraphs: Sequence[str], links: Sequence[Link], listener: Callable[[str], None] | None) -> None:
    """All paragraphs to the log and to FlexIPSampler, and each to the Apply node of its link; warnings stand out there."""
    report = "\n\n".join(paragraphs)
    logging.log(logging.WARNING if WARNING in report else logging.INFO, "FlexIP\n%s", report)
    if listener is not None:
        listener(report)
    for link, paragraph in zip(links, paragraphs):
        send(paragraph, link.node_id)


def sentences(lines: Iterable[str]) -> str:
    """One text of them; with full stops, because the page's new nodes show line breaks as spaces."""
    return END.join(lines)


def id_of(node: type[io.ComfyNode]) -> str | None:
    """Of the node in the page whose execute runs; None where there is no page."""
    return node.hidden.unique_id if node.hidden else None


def tell(node: type[io.ComfyNode], text: str) -> None:
    """Onto the node whose execute runs."""
    send(text, id_of(node))


def warn(text: str, node_id: str | None) -> None:
    logging.warning("FlexIP\n" + WARNING + "%s", text)
    send(WARNING + text, node_id)


def send(text: str, node_id: str | None) -> None:
    """Onto a node of the page: as its progress text, and its warnings (web/js/warnings.js) as a badge and a notice."""
    if node_id is None:
        return
    from server import PromptServer  # absent where ComfyUI is used as a library

    server = getattr(PromptServer, "instance", None)
    client = getattr(server, "client_id", None)  # who queued the prompt that runs
    if client is None:  # nobody waits; and without a client the server tells everybody, whatever their page shows
        return
    server.send_progress_text(without_markup(text), node_id, client)
    warnings = [part.removeprefix(WARNING) for part in text.split(END) if part.startswith(WARNING)]
    # sent without warnings, too: they take the last run's away
    server.send_sync("flexip.warnings", {"node": node_id, "warnings": warnings}, client)


def without_markup(text: str) -> str:
    """Words of strangers, whose files and workflows they come from, so that every page shows them as text.

    ComfyUI's page takes progress text for HTML and makes a link of [[label|address]]; older ones run the scripts in it. Vue nodes
    take it for Markdown, with links and pictures from anywhere. Newer pages escape HTML themselves and would show entities as
    such, so nothing is replaced: markup is only parted, by a space without width.
    """
    return _MARKUP.sub(lambda found: found[0] + _ZERO_WIDTH_SPACE, text)
