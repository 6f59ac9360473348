"""Batches made by a thread, one ahead, while the device works on the one before.

What a batch holds is a function of the run's seed and the step, so it does not matter when it is made, and a resumed run is exact.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

from .data import Batch

Key = TypeVar("Key", bound=Hashable)


class Ahead(Generic[Key]):
    """`make(key)` gives a batch on the CPU; here it is copied to `device` as well, beside what runs there."""

    def __init__(self, make: Callable[[Key], Batch], device: torch.device):
        self.make, self.device = make, device
        self.waited = 0.0  # seconds, of all calls
        self._pool = ThreadPoolExecutor(1, "batch ahead")
        self._next: tuple[Key, Future] | None = None
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def get(self, key: Key, following: Key | None) -> Batch:
        """The batch of `key`; that of `following` is begun. What `make` raises comes from the call that asks for that batch."""
        found, self._next = self._next, None
        future = found[1] if found is not None and found[0] == key else self._pool.submit(self._made, key)
        begin = time.perf_counter()
        try:
            batch, copied = future.result()
        finally:
            self.waited += time.perf_counter() - begin
        if following is not None:
            self._next = following, self._pool.submit(self._made, following)
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            mapped(batch, lambda tensor: tensor.record_stream(current))  # its memory is not given away while that runs
        return batch

    def _made(self, key: Key) -> tuple[Batch, Any]:
        batch = self.make(key)
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            moved = mapped(batch, lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True))
            return moved, self._stream.record_event()


def mapped(batch: Batch, how: Callable[[torch.Tensor], torch.Tensor | None]) -> Batch:
    """Targets and references; kinds, captions and sizes are small, and read on the CPU."""

    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: one(item) for name, item in value.items()}
        return how(value) if isinstance(value, torch.Tensor) else value

    return dataclasses.replace(batch, targets=one(batch.targets), references=one(batch.references))
