"""One sampling run: K and V per conditioning before the first step, assembled per UNet call while sampling.

Independent of ComfyUI: nodes/runtime.py feeds it from ComfyUI's wrappers. Every row of a UNet call says which conditioning it
belongs to and which latent it is; nothing is concluded from its place in the batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .adapters import BlockKV
from .attention import Branch
from .gate import gated_branches, stack_rows
from .reference import Reference

Rows = tuple[tuple[int, int], ...]
"""Per row of a UNet call: the index of its conditioning in `Run.entries`, and its row in the latent batch."""
LAYOUTS = 4  # assembled layouts kept per link: positive and negative, together or apart, in a window or two


@dataclass(frozen=True, eq=False)
class Link:
    """What one ApplyFlexIPGate adds to a model: immutable, shared by all clones of the model.

    `gates` holds one value, or one per row of the latent batch. `network` is a FlexIPNetwork (or whatever has its interface).
    """

    network: Any
    patcher: Any  # ComfyUI's ModelPatcher of the network
    reference: Reference
    gates: tuple[float, ...]
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    title: str = ""  # files, for the report
    node_id: str | None = None


@dataclass(frozen=True)
class Entry:
    """One conditioning of the run: its text (b, t, w), and whether it gets the null reference."""

    text: torch.Tensor
    null: bool


@dataclass
class Counters:
    calls: int = 0
    active: int = 0
    untagged: int = 0
    projected: int = 0
    from_cache: int = 0


class LinkRun:
    """One link of the chain during one run. The window is in sigmas, start the larger one."""

    def __init__(self, link: Link, position: int, sigma_start: float, sigma_end: float):
        self.link = link
        self.position = position
        self.window = (sigma_start, sigma_end)
        self.always = link.start_percent <= 0.0 and link.end_percent >= 1.0
        self.kv: list[dict[str, BlockKV]] = []  # per entry: adapter -> block -> K, V on the CPU
        self.counters = Counters()
        self._assembled: dict[tuple, dict[tuple[int, str], tuple[Branch, ...]]] = {}

    def active_at(self, sigma: float | None) -> bool:
        return self.always or self.window[1] <= sigma <= self.window[0]

    def token_counts(self) -> str:
        """Tokens per adapter as projected, of the entry with the most of them."""
        first = next(iter(self.link.network.block_widths))
        return " + ".join(
            str(max(kv[name][first][0].shape[1] for kv in self.kv)) for name in self.link.network.adapters
        )

    def missing(self, entries: list[Entry], dtype: torch.dtype) -> bool:
        """True when projecting `entries` would need the network's weights."""
        link = self.link
        return any(
            link.reference.cache.get(link.network, self._key(name, e, dtype)) is None
            for e in entries
            for name in link.network.adapters
        )

    def project(self, entries: list[Entry], dtype: torch.dtype, device: torch.device) -> None:
        """Add K and V for `entries`, from the reference's cache or computed on `device` in float32."""
        link, cache = self.link, self.link.reference.cache
        for entry in entries:
            kv = {}
            for name in link.network.adapters:
                key = self._key(name, entry, dtype)
                kv[name] = cache.get(link.network, key)
                if kv[name] is None:
                    kv[name] = _project(link, name, entry, dtype, device)
                    cache.put(link.network, key, kv[name])
                    self.counters.projected += 1
                else:
                    self.counters.from_cache += 1
            self.kv.append(kv)

    def _key(self, adapter: str, entry: Entry, dtype: torch.dtype) -> tuple:
        return adapter, entry.null, dtype, text_key(entry.text) if self.link.network.reads_text(adapter) else None

    def branches(
        self, rows: Rows, device: torch.device, dtype: torch.dtype
    ) -> dict[tuple[int, str], tuple[Branch, ...]]:
        """{(position, address): branches} for the rows of one UNet call; the last few layouts are kept on the device."""
        key = (rows, device, dtype)
        if key not in self._assembled:
            while len(self._assembled) >= LAYOUTS:
                self._assembled.pop(next(iter(self._assembled)), None)
            self._assembled[key] = self._assemble(rows, device, dtype)
        return self._assembled[key]

    def _assemble(
        self, rows: Rows, device: torch.device, dtype: torch.dtype
    ) -> dict[tuple[int, str], tuple[Branch, ...]]:
        network, gates = self.link.network, self.link.gates
        gate: Any = gates[0]
        if len(gates) > 1:
            gate = torch.tensor([gates[row] for _, row in rows], device=device).view(-1, 1, 1)
        # neighbouring rows of one conditioning go together
        groups = [
            (entry, [row for _, row in group]) for entry, group in itertools.groupby(rows, key=lambda pair: pair[0])
        ]
        out = {}
        for address in network.block_widths:
            stacked = {
                name: stack_rows(
                    [_for_rows(self.kv[entry][name][address], numbers, device, dtype) for entry, numbers in groups]
                )
                for name in network.adapters
            }
            out[self.position, address] = gated_branches(
                network.gate_mode, gate, self.link.strength, stacked.get("preservation"), stacked.get("personalization")
            )
        return out


def _for_rows(
    kv: tuple[torch.Tensor, torch.Tensor], rows: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K, V (texts, n, c) of one conditioning for these rows of the latent batch, (len(rows), n, c)."""
    k, v = (t.to(device, dtype) for t in kv)
    if k.shape[0] == 1:
        return k.expand(len(rows), -1, -1), v.expand(len(rows), -1, -1)
    index = torch.tensor([row % k.shape[0] for row in rows], device=device)  # as core repeats a short text batch
    return k[index], v[index]


class Run:
    """The state of one sampling run; an object, because ComfyUI copies dicts and lists per UNet call.

    `neighbours` counts the slots that also hold another node's patch (part of the structure that torch.compile must notice).
    """

    def __init__(self, links: list[LinkRun], neighbours: int = 0):
        self.links = links
        self.neighbours = neighbours
        self.entries: list[Entry] = []
        self._untagged: dict[tuple, int] = {}

    @property
    def reads_sigma(self) -> bool:
        return not all(link.always for link in self.links)

    def prepare(self, entries: list[Entry], dtype: torch.dtype, device_of: Callable[[Link], torch.device]) -> None:
        """Project K and V of `entries` for every link; `device_of` loads the link's network and is called only if needed."""
        self.entries += entries
        for run in self.links:
            device = device_of(run.link) if run.missing(entries, dtype) else torch.device("cpu")
            run.project(entries, dtype, device)

    def untagged(self, text: torch.Tensor, chunks: int, dtype: torch.dtype) -> Rows:
        """Rows for a call whose conditioning a node made itself: the null reference, with the call's text.

        text (chunks * count, t, w). Computed where the text is, with weights cast as they come.
        """
        rows: list[tuple[int, int]] = []
        for part in text.chunk(chunks):
            key = text_key(part)
            if key not in self._untagged:
                self._untagged[key] = len(self.entries)
                self.prepare([Entry(part.detach(), null=True)], dtype, lambda link: text.device)
            rows += [(self._untagged[key], row) for row in range(part.shape[0])]
        for run in self.links:
            run.counters.untagged += 1
        return tuple(rows)

    def assemble(
        self, rows: Rows, device: torch.device, dtype: torch.dtype, sigma: float | None
    ) -> tuple[dict[tuple[int, str], tuple[Branch, ...]], str]:
        """Tensors for the patches and the name of their structure, or ({}, "") where no link is active."""
        tensors: dict[tuple[int, str], tuple[Branch, ...]] = {}
        names = []
        for run in self.links:
            run.counters.calls += 1
            if not run.active_at(sigma):
                continue
            run.counters.active += 1
            tensors.update(run.branches(rows, device, dtype))
            names.append(_structure(run, tensors))
        return tensors, f"flexip_{self.neighbours}_" + "_".join(names) if names else ""


def _structure(run: LinkRun, tensors: dict) -> str:
    """What torch.compile must notice: tokens per branch, masks, number of blocks, gate mode, place in the chain."""
    blocks = run.link.network.block_widths
    first = tensors[run.position, next(iter(blocks))]
    tokens = "_".join(f"{k.shape[1]}{'m' if mask is not None else ''}" for k, _, mask in first)
    return f"{run.position}{run.link.network.gate_mode[0]}{len(blocks)}_{tokens}"


def _project(link: Link, adapter: str, entry: Entry, dtype: torch.dtype, device: torch.device) -> BlockKV:
    features = link.reference.null if entry.null else link.reference.features
    features = {name: value.to(device, torch.float32) for name, value in features.items()}
    text = entry.text.to(device, torch.float32) if link.network.reads_text(adapter) else None
    kv = link.network.project(adapter, link.network.tokens(adapter, features, text))
    return {address: (k.to("cpu", dtype), v.to("cpu", dtype)) for address, (k, v) in kv.items()}


def text_key(text: torch.Tensor) -> tuple:
    """Content, not identity: a re-encoded prompt is a new tensor with the same numbers."""
    data = text.detach().cpu().contiguous()
    return tuple(data.shape), str(data.dtype), hashlib.blake2b(data.view(torch.uint8).numpy(), digest_size=16).digest()
