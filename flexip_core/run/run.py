"""One sampling run: K and V per conditioning before the first step, assembled per UNet call while sampling.

Independent of ComfyUI: nodes/runtime.py feeds it from ComfyUI's wrappers. Every row of a UNet call says which conditioning it
belongs to and which latent it is; nothing is concluded from its place in the batch.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..network.adapters import BlockKV
from ..network.attention import Branch
from ..network.gate import Place, gated_branches, stack_rows
from .chain import Branches, Call, Counters, Entry, Link, Own, Row, Setting
from .lru import Kept, bytes_of
from .masks import for_rows, on_grid, on_latent
from .reference import Reference, ReferenceSet, Shared, as_set, combined, kv_bytes, row_strength
from .schedule import GateBatch, GateCurve

LAYOUTS = 4  # kept at least per link: positive and negative, together or apart, and a second gate or window


class LinkRun:
    """One link of the chain during one run. The window is in sigmas, start the larger one."""

    def __init__(self, link: Link, position: int, sigma_start: float, sigma_end: float, setting: Setting | None = None):
        self.link = link
        self.position = position
        self.window = (sigma_start, sigma_end)
        self.always = link.start_percent <= 0.0 and link.end_percent >= 1.0
        self.setting = setting or Setting()
        self.entries: list[Entry] = []
        self.kv: list[list[dict[str, BlockKV]]] = []  # per entry, per reference: adapter -> block -> K, V on the CPU
        self.counters = Counters()
        self._stacked = Kept(LAYOUTS * len(link.network.block_widths))  # by call and block
        self._places = Kept(LAYOUTS)
        self._assembled = Kept(LAYOUTS)

    def active_at(self, sigma: float | None) -> bool:
        return self.always or self.window[1] <= sigma <= self.window[0]

    @property
    def changes(self) -> bool:
        """Whether the gate changes while sampling."""
        return any(isinstance(gates, GateCurve) for gates in self._all_gates())

    @property
    def has_masks(self) -> bool:
        sets = [self._set(number) for number in range(len(self.entries))]
        return any(mask is not None for mask in (self.link.mask, self.link.gate_mask, *(s.masks for s in sets)))

    def mask_is_somewhere(self) -> bool:
        """Whether the link acts anywhere in the picture, whatever the gate."""
        mask = self.link.mask
        return mask is None or bool(mask.any())

    def gates_at(self, sigma: float | None) -> tuple[float, ...]:
        """The link's own γ, one or one per row of the latent batch."""
        return self._numbers(self.link.gates, sigma)

    def token_counts(self) -> str:
        """Tokens per adapter as projected, of the entry with the most of them."""
        first = next(iter(self.link.network.block_widths))
        return " + ".join(
            str(max((sum(kv[name][first][0].shape[1] for kv in parts) for parts in self.kv), default=0))
            for name in self.link.network.adapters
        )

    def bytes_per_row(self) -> int:
        """What K and V of one row of a call take on its device; twice where the gate changes, since it is folded in anew."""
        most = max((sum(kv_bytes(kv) for part in parts for kv in part.values()) for parts in self.kv), default=0)
        return 2 * most if self.changes else most

    def missing(self, entries: list[Entry], dtype: torch.dtype) -> bool:
        """True when projecting `entries` would need the network's weights."""
        return any(
            reference.cache.get(self.link.network, self._key(name, entry, null, dtype)) is None
            for entry in entries
            for reference, null in self._sources(entry)
            for name in self.link.network.adapters
        )

    def project(self, entries: list[Entry], dtype: torch.dtype, device: torch.device) -> None:
        """Add K and V for `entries`, from the references' caches or computed on `device` in float32."""
        for entry in entries:
            parts = []
            for reference, null in self._sources(entry):
                parts.append(
                    {name: self._kv(reference, name, entry, null, dtype, device) for name in self.link.network.adapters}
                )
            self.entries.append(entry)
            self.kv.append(parts)

    def _kv(
        self, reference: Reference, name: str, entry: Entry, null: bool, dtype: torch.dtype, device: torch.device
    ) -> BlockKV:
        network, key = self.link.network, self._key(name, entry, null, dtype)
        kv = reference.cache.get(network, key)
        if kv is not None:
            self.counters.from_cache += 1
            return kv
        kv = _project(network, reference, name, entry, null, dtype, device)
        reference.cache.put(network, key, kv)
        self.counters.projected += 1
        return kv

    def _key(self, adapter: str, entry: Entry, null: bool, dtype: torch.dtype) -> tuple:
        return adapter, null, dtype, text_key(entry.text) if self.link.network.reads_text(adapter) else None

    def _own(self, entry: Entry) -> Own | None:
        return entry.own.get(self.position)

    def _sources(self, entry: Entry) -> tuple[tuple[Reference, bool], ...]:
        own = self._own(entry)
        return self._set_of(own).sources(entry.null)

    def _set(self, number: int) -> ReferenceSet:
        return self._set_of(self._own(self.entries[number]))

    def _set_of(self, own: Own | None) -> ReferenceSet:
        return as_set(self.link.reference if own is None or own.reference is None else own.reference)

    def _all_gates(self) -> list[Any]:
        return [self.link.gates, *(own.gates for entry in self.entries if (own := self._own(entry)))]

    def _numbers(self, gates: Any, sigma: float | None) -> tuple[float, ...]:
        if isinstance(gates, GateCurve):
            return (gates(self.setting.percent_of(sigma)),)
        return gates.values_for(self.setting.latents) if isinstance(gates, GateBatch) else gates

    def _row_gates(self, rows: tuple[Row, ...], sigma: float | None) -> tuple[float, ...]:
        own = [self._own(entry) for entry in self.entries]
        values = [self._numbers(o.gates if o else self.link.gates, sigma) for o in own]
        return tuple(values[row.entry][row.item % len(values[row.entry])] for row in rows)

    def _row_strengths(self, rows: tuple[Row, ...], number: int) -> tuple[float, ...]:
        """Factor of branch `number` for each row; 0 where a row's conditioning has no such branch."""
        out = []
        for row in rows:
            references, own = self._set(row.entry), self._own(self.entries[row.entry])
            if number >= self._branch_count(row.entry):
                out.append(0.0)
                continue
            strengths = self.link.strengths or (self.link.strength,)
            factor = row_strength(references.combine, references.weights, row.item % self.setting.latents, number)
            out.append(strengths[row.item % len(strengths)] * factor * (own.strength if own else 1.0))
        return tuple(out)

    def _branch_count(self, number: int) -> int:
        references = self._set(number)
        return len(references.references) if references.combine == "one per region" else 1

    def branches(self, call: Call, sigma: float | None) -> tuple[Branches, str]:
        """{(position, address): branches} for one UNet call and the name of their structure."""
        gates = self._row_gates(call.rows, sigma)
        kept = self._assembled.get(call)
        if kept is None or kept[0] != gates:
            self._assembled.make_room(call)
            branches = self._assemble(call, gates)
            kept = gates, branches, _structure(self, branches)
            self._assembled.put(call, kept, bytes_of(itertools.chain(*branches.values())))
        return kept[1:]

    def _assemble(self, call: Call, gates: tuple[float, ...]) -> Branches:
        network, depth = self.link.network, self.link.depth
        counts = max(self._branch_count(row.entry) for row in call.rows)
        strengths = [self._row_strengths(call.rows, number) for number in range(counts)]
        places = self._places_of(call, counts)
        out: Branches = {}
        for address in network.block_widths:
            factors = tuple(
                depth[name][address] if depth is not None else 1.0 for name in ("preservation", "personalization")
            )
            if not any(factors):
                continue
            level = self.setting.levels.get(address, 0)
            out[self.position, address] = tuple(
                branch
                for number, stacked in enumerate(self._stack(call, address, counts))
                for branch in gated_branches(
                    network.gate_mode,
                    gates,
                    strengths[number],
                    stacked.get("preservation"),
                    stacked.get("personalization"),
                    factors,
                    places[number].get(level, Place()),
                )
            )
        return out

    def _stack(self, call: Call, address: str, counts: int) -> list[dict[str, Branch]]:
        """Per branch: adapter -> K, V of all rows. Kept on the device only where the gate will change."""
        if not self.changes:
            return self._stack_now(call, address, counts)
        kept = self._stacked.get((call, address))
        if kept is None:
            self._stacked.make_room((call, address))
            kept = self._stack_now(call, address, counts)
            self._stacked.put((call, address), kept, bytes_of(branch for part in kept for branch in part.values()))
        return kept

    def _stack_now(self, call: Call, address: str, counts: int) -> list[dict[str, Branch]]:
        # neighbouring rows of one conditioning go together
        groups = [
            (entry, [row.item for row in rows])
            for entry, rows in itertools.groupby(call.rows, key=lambda row: row.entry)
        ]
        out: list[dict[str, Branch]] = [{} for _ in range(counts)]
        for name in self.link.network.adapters:
            parts = []
            for entry, items in groups:
                pairs = [tuple(t.to(call.device, call.dtype) for t in kv[name][address]) for kv in self.kv[entry]]
                references = self._set(entry)
                latents = [item % self.setting.latents for item in items]
                found = combined(references.combine, references.weights, pairs, items, latents)
                nothing = Branch(*(torch.zeros_like(t[:1, :1]).expand(len(items), -1, -1) for t in pairs[0]))
                parts.append([*found, *[nothing] * (counts - len(found))])
            for number in range(counts):
                out[number][name] = stack_rows([part[number] for part in parts])
        return out

    def _places_of(self, call: Call, counts: int) -> list[dict[int, Place]]:
        """Per branch: level -> the masks on that grid. Empty without masks."""
        if not self.has_masks:
            return [{}] * counts
        kept = self._places.get(call)
        if kept is None:
            self._places.make_room(call)
            kept = [self._place(call, number) for number in range(counts)]
            self._places.put(call, kept, bytes_of(place for levels in kept for place in levels.values()))
        return kept

    def _place(self, call: Call, number: int) -> dict[int, Place]:
        strength = _all_rows_alike(_product(self._shown(self.link.mask, call), self._regions(call, number)))
        gate = _all_rows_alike(self._shown(self.link.gate_mask, call))

        def on_level(maps: torch.Tensor | None, level: int) -> torch.Tensor | None:
            return None if maps is None else on_grid(maps, level).to(call.device, call.dtype)

        levels = set(self.setting.levels.values())
        return {level: Place(on_level(strength, level), on_level(gate, level)) for level in levels}

    def _shown(self, masks: torch.Tensor | None, call: Call) -> torch.Tensor | None:
        """(rows, h, w) of the call's part of each row's mask."""
        if masks is None:
            return None
        whole = on_latent(masks, self.setting.height, self.setting.width)
        latents = [row.item % self.setting.latents for row in call.rows]
        return for_rows(whole, latents, [row.view for row in call.rows], call.height, call.width)

    def _regions(self, call: Call, number: int) -> torch.Tensor | None:
        """(rows, h, w) of the masks of "one per region"; 1 in rows whose conditioning has none."""
        sets = [self._set(row.entry) for row in call.rows]
        if all(references.masks is None for references in sets):
            return None
        maps = []
        for row, references in zip(call.rows, sets):
            if references.masks is None or number >= len(references.masks):
                maps.append(torch.ones(1, call.height, call.width))
            else:
                maps.append(self._shown(references.masks[number : number + 1], call._replace(rows=(row,))))
        return torch.cat(maps)


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a * b


def _all_rows_alike(maps: torch.Tensor | None) -> torch.Tensor | None:
    """One row for all of them where they are equal."""
    return maps if maps is None or len(maps) == 1 or not (maps[1:] == maps[:1]).all() else maps[:1]


class Run(Shared):
    """The state of one sampling run; an object, because ComfyUI copies dicts and lists per UNet call.

    `neighbours` counts the slots that also hold another node's patch (part of the structure that torch.compile must notice).
    """

    def __init__(self, links: list[LinkRun], neighbours: int = 0):
        self.links = links
        self.neighbours = neighbours
        self.entries: list[Entry] = []
        self._untagged: dict[tuple, int] = {}
        self._lock = threading.Lock()  # ComfyUI's MultiGPU CFG split calls from one thread per device

    @property
    def reads_sigma(self) -> bool:
        return not all(link.always and not link.changes for link in self.links)

    def bytes_per_row(self) -> int:
        return sum(run.bytes_per_row() for run in self.links)

    def prepare(self, entries: list[Entry], dtype: torch.dtype, device_of: Callable[[LinkRun], torch.device]) -> None:
        """Project K and V of `entries` for every link; `device_of` loads the link's network and is called only if needed."""
        self.entries += entries
        for run in self.links:
            device = device_of(run) if run.missing(entries, dtype) else torch.device("cpu")
            run.project(entries, dtype, device)

    def untagged(self, text: torch.Tensor, chunks: int, dtype: torch.dtype) -> tuple[Row, ...]:
        """Rows for a call whose conditioning a node made itself: the null reference, with the call's text.

        text (chunks * count, t, w). Computed where the text is, with weights cast as they come.
        """
        rows: list[Row] = []
        with self._lock:
            for part in text.chunk(chunks):
                key = text_key(part)
                if key not in self._untagged:
                    self._untagged[key] = len(self.entries)
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


def _is_unknown_tile(call: Call, setting: Setting) -> bool:
    whole = (call.height, call.width) == (setting.height, setting.width)
    return not whole and any(row.view is None for row in call.rows)


def _structure(run: LinkRun, branches: Branches) -> str:
    """What torch.compile must notice: place in the chain, gate mode, and in each block tokens per branch, masks and maps."""
    shapes = {address: "_".join(map(_shape, parts)) for (_, address), parts in branches.items()}
    distinct = set(shapes.values())
    if len(distinct) == 1 and len(shapes) == len(run.link.network.block_widths):
        blocks = distinct.pop()
    else:
        blocks = hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest()
    return f"{run.position}{run.link.network.gate_mode[0]}{len(shapes)}_{blocks}"


def _shape(branch: Branch) -> str:
    mask = "" if branch.mask is None else "m" if branch.mask.dtype == torch.bool else "b"
    maps = [
        "" if t is None else f"{name}{min(len(t), 2)}" for name, t in (("p", branch.place), ("g", branch.place_gate))
    ]
    return f"{branch.k.shape[1]}{mask}{''.join(maps)}"


def _project(
    network: Any,
    reference: Reference,
    adapter: str,
    entry: Entry,
    null: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> BlockKV:
    features = reference.null if null else reference.features
    features = {name: value.to(device, torch.float32) for name, value in features.items()}
    text = entry.text.to(device, torch.float32) if network.reads_text(adapter) else None
    kv = network.project(adapter, network.tokens(adapter, features, text))
    return {address: (k.to("cpu", dtype), v.to("cpu", dtype)) for address, (k, v) in kv.items()}


def text_key(text: torch.Tensor) -> tuple:
    """Content, not identity: a re-encoded prompt is a new tensor with the same numbers."""
    data = text.detach().cpu().contiguous()
    return tuple(data.shape), str(data.dtype), hashlib.blake2b(data.view(torch.uint8).numpy(), digest_size=16).digest()
