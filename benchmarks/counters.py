"""What one UNet call costs, counted instead of timed: operations, FLOPs, host synchronisations, bytes written."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

SYNCS = {
    "copy to the host",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
}
# torch's counter knows only the GPU's attention kernels
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
COPIES = {"aten::_to_copy", "aten::copy_"}  # a sync where they leave a GPU; on a CPU run there is none to see
UPLOAD = "blocking copy to a device"
PROJECTIONS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"}


@dataclass(frozen=True)
class Cost:
    operations: int  # aten operations whose result is no view of an input
    gflop: float
    syncs: int  # values that the host waits for
    megabytes: float  # of all results, in-place ones too
    matmuls: int  # linear layers among the operations: a projection would show here
    uploads: int = 0  # copies from the CPU to another device ("meta" stands for one on a CPU) that the host waits for

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in COPIES and _leaves_the_gpu(args, result):
            self.counts["copy to the host"] += 1
        if name in COPIES and _enters_a_device(args, result) and not _is_non_blocking(function, args, kwargs):
            self.counts[UPLOAD] += 1
        if name in SYNCS or not _is_view(function):
            self.counts[name] += 1
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.bytes += tensor.numel() * tensor.element_size()
        return result


class _Numbers(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)` copies out of sight of the dispatcher, and waits."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in self.MAKERS and not isinstance(args[0], torch.Tensor) and result.device.type != "cpu":
            self.counts[UPLOAD] += 1
        return result


def _leaves_the_gpu(args: tuple, result: Any) -> bool:
    sources = [t for t in args if isinstance(t, torch.Tensor) and t.device.type != "cpu"]
    return bool(sources) and isinstance(result, torch.Tensor) and result.device.type == "cpu"


def _enters_a_device(args: tuple, result: Any) -> bool:
    sources = (
        args[1:2] if len(args) > 1 and isinstance(args[1], torch.Tensor) else args[:1]
    )  # copy_(to, from), _to_copy(from)
    return sources[0].device.type == "cpu" and isinstance(result, torch.Tensor) and result.device.type != "cpu"


def _is_non_blocking(function: Any, args: tuple, kwargs: dict | None) -> bool:
    names = [argument.name for argument in function._schema.arguments]
    given = {**dict(zip(names, args)), **(kwargs or {})}
    return bool(given.get("non_blocking", False))


def _is_view(function: Any) -> bool:
    """An operation whose result aliases an input without writing to it."""
    aliases = [argument.alias_info for argument in function._schema.arguments if argument.alias_info is not None]
    returned = [result.alias_info for result in function._schema.returns if result.alias_info is not None]
    return (
        bool(returned)
        and not any(alias.is_write for alias in aliases)
        or function._schema.name in ("aten::_unsafe_view", "aten::detach")
    )


def count(call: Callable[[], Any]) -> Cost:
    operations = _Operations()
    flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with flops, operations, _Numbers(operations.counts):
        call()
    total = operations.counts
    return Cost(
        sum(total.values()) - total["copy to the host"] - total[UPLOAD],
        flops.get_total_flops() / 1e9,
        sum(total[name] for name in SYNCS),
        operations.bytes / 1e6,
        sum(total[name] for name in PROJECTIONS),
        total[UPLOAD],
    )


def per_call(run: Callable[[int], Any]) -> Cost:
    """Cost of one more step of `run(steps)`: what happens once per run cancels out, what happens once at all is done before."""
    run(1)
    return count(lambda: run(3)) - count(lambda: run(2))


class _Live(TorchDispatchMode):
    """Bytes of all tensors that were made and are still referred to; views share the storage they look at."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._references: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self._references or storage._cdata not in known:
                    self._hold(tensor, storage._cdata, storage.nbytes())
        return result

    def _hold(self, tensor: torch.Tensor, key: int, size: int) -> None:
        if not self._references[key]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._references[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self.now -= size


def peak_megabytes(call: Callable[[], Any]) -> float:
    """The most that tensors made during `call` took at one time; what was there before does not count."""
    live = _Live()
    with live:
        call()
    return live.peak / 1e6
