"""One sampling run: K and V per conditioning before the first step, assembled per UNet call while sampling.

Independent of ComfyUI: nodes/runtime.py feeds it from ComfyUI's wrappers. Every row of a UNet call says which conditioning it
belongs to and which latent it is; nothing is concluded from its place in the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..network.adapters import BlockKV
from .chain import Branches, Call, Counters, Entry, Link, Row, Setting
from .layout import folded, has_masks, laid_out, numbers_at, structure
from .lru import Lru
from .projection import Conditioning, Projection, plan, text_key
from .reference import Shared
from .schedule import GateCurve

LAYOUTS = 4  # kept at least per link: positive and negative, together or apart, and a second gate or window


class LinkRun:
    """One link of the chain during one run. The window is in sigmas, start the larger one."""

    def __init__(self, link: Link, position: int, sigma_start: float, sigma_end: float, setting: Setting | None = None):
        self.link = link
        self.position = position
        self.window = (sigma_start, sigma_end)
        self.always = link.start_percent <= 0.0 and link.end_percent >= 1.0
        self.setting = setting or Setting()
        self.conditionings: list[Conditioning] = []  # one per entry of the run
        self.counters = Counters()
        self._layouts = Lru(LAYOUTS)  # by call

    def active_at(self, sigma: float | None) -> bool:
        """Without a sigma (see `reads_sigma`) the window is the whole sampling."""
        return self.always or (sigma is not None and self.window[1] <= sigma <= self.window[0])

    @property
    def changes(self) -> bool:
        """Whether the gate changes while sampling."""
        return any(
            isinstance(gates, GateCurve) for gates in (self.link.gates, *(part.gates for part in self.conditionings))
        )

    @property
    def has_masks(self) -> bool:
        return has_masks(self.link, self.conditionings)

    def mask_is_somewhere(self) -> bool:
        """Whether the link acts anywhere in the picture, whatever the gate."""
        mask = self.link.mask
        return mask is None or bool(mask.any())

    def gates_at(self, sigma: float | None) -> tuple[float, ...]:
        """The link's own γ, one or one per row of the latent batch."""
        return numbers_at(self.link.gates, sigma, self.setting)

    def token_counts(self) -> str:
        """Tokens per adapter as projected, of the conditioning with the most of them."""
        return " + ".join(
            str(max((sum(part.token_counts(name)) for part in self.conditionings), default=0))
            for name in self.link.network.adapters
        )

    def bytes_per_row(self) -> int:
        """What K and V of one row of a call take on its device; twice where the gate changes, since it is folded in anew."""
        most = max((part.bytes for part in self.conditionings), default=0)
        return 2 * most if self.changes else most

    def project(self, entries: list[Entry], dtype: torch.dtype, device_of: Callable[[LinkRun], torch.device]) -> None:
        """Add `entries`, with K and V from the references' caches, or computed in float32 on the device that has the weights."""
        plans = [plan(self.link, entry, entry.own.get(self.position), dtype) for entry in entries]
        missing = any(projection.kept() is None for part in plans for projection in part)
        device = device_of(self) if missing else torch.device("cpu")
        self.conditionings += [part.conditioning(lambda projection: self._kv(projection, device)) for part in plans]

    def _kv(self, projection: Projection, device: torch.device) -> BlockKV:
        kv = projection.kept()
        if kv is not None:
            self.counters.from_cache += 1
            return kv
        self.counters.projected += 1
        return projection.make(device)

    def branches(self, call: Call, sigma: float | None) -> tuple[Branches, str]:
        """{(position, address): branches} for one UNet call and the name of their structure."""
        layout = self._layouts.get(call)
        if layout is None:
            self._layouts.make_room(call)
            layout = laid_out(self.link, call, self.setting, self.conditionings)
        gates = tuple(row.gate_at(sigma, self.setting) for row in layout.rows)
        if layout.gates != gates:
            layout = folded(layout, self.link, self.setting.levels, gates, keep=self.changes)
            self._layouts.put(call, layout, layout.bytes)
        blocks = {(self.position, address): branches for address, branches in layout.blocks.items()}
        return blocks, structure(layout, self.link, self.position)


class Run(Shared):
    """The state of one sampling run; an object, because ComfyUI copies dicts and lists per UNet call.

    `neighbours` counts the slots that also hold another node's patch (part of the structure that torch.compile must notice).
    """

    def __init__(self, links: list[LinkRun], neighbours: int = 0):
        self.links = links
        self.neighbours = neighbours
        self.moves: dict[tuple, Any] = {}  # how patches of other nodes move rows: see nodes/patches.py
        self._untagged: dict[tuple, int] = {}
        self._lock = threading.Lock()  # ComfyUI's MultiGPU CFG split calls from one thread per device

    @property
    def reads_sigma(self) -> bool:
        return not all(link.always and not link.changes for link in self.links)

    def bytes_per_row(self) -> int:
        return sum(run.bytes_per_row() for run in self.links)

    def prepare(self, entries: list[Entry], dtype: torch.dtype, device_of: Callable[[LinkRun], torch.device]) -> None:
        """Project K and V of `entries` for every link; `device_of` loads the link's network and is called only if needed."""
        for run in self.links:
            run.project(entries, dtype, device_of)

    def untagged(self, text: torch.Tensor, chunks: int, dtype: torch.dtype) -> tuple[Row, ...]:
        """Rows for a call whose conditioning a node made itself: the null reference, with the call's text.

        text (chunks * count, t, w). Computed where the text is, with weights cast as they come.
        """
        rows: list[Row] = []
        with self._lock:
            for part in text.chunk(chunks):
                key = text_key(part)
                if key not in self._untagged:
                    self._untagged[key] = len(self.links[0].conditionings)
                    self.prepare([Entry(part.detach(), null=True)], dtype, lambda link: text.device)
                rows += [Row(self._untagged[key], item) for item in range(part.shape[0])]
            for run in self.links:
                run.counters.untagged += 1
        return tuple(rows)

    def assemble(self, call: Call, sigma: float | None) -> tuple[Branches, str]:
        """Tensors for the patches and the name of their structure, or ({}, "") where no link is active."""
        tensors: Branches = {}
        names = []
        with self._lock:
            for run in self.links:
                run.counters.calls += 1
                if not run.active_at(sigma):
                    continue
                run.counters.active += 1
                run.counters.tiles += run.has_masks and _is_unknown_tile(call, run.setting)
                branches, name = run.branches(call, sigma)
                tensors.update(branches)
                names.append(name)
        return tensors, f"flexip_{self.neighbours}_" + "_".join(names) if names else ""

    def moved(self, call: Call, rows: Sequence[int], sigma: float | None) -> Branches:
        """Tensors for a block where another node's patch has put the call's rows `rows` in place of all in turn."""
        call = call._replace(rows=tuple(call.rows[row] for row in rows))
        tensors: Branches = {}
        with self._lock:
            for run in self.links:
                if run.active_at(sigma):
                    tensors.update(run.branches(call, sigma)[0])
        return tensors


def _is_unknown_tile(call: Call, setting: Setting) -> bool:
    whole = (call.height, call.width) == (setting.height, setting.width)
    return not whole and any(row.view is None for row in call.rows)
