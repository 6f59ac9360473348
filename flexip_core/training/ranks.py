"""Several processes that train one set of adapters together, as torchrun starts them; Accelerate's launcher sets the same variables.

Every rank holds the frozen base, the adapters, their optimizer and their average. It draws for the whole batch but computes only
its share of the rows; then the gradients are summed over the ranks (optim.average_gradients), and each takes the same step.
Rank 0 alone writes files; what it reads, it sends to the others, so that no disk needs to be shared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)  # longer than any probe, save or read of a batch
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why in one sentence."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; the default is a single process, for which nothing below costs or changes anything.

    All ranks must call the methods that communicate (`any`, `check`, `together`, `agree`, `send`, `sum`) in the same order.
    """

    rank: int = 0
    count: int = 1
    local: int = 0  # number among the ranks of this machine

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This rank's rows of a batch of all ranks."""
        share = batch // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def device(self, name: str) -> str:
        """The config's device for this rank: "cuda" is each rank's own GPU."""
        if self.count == 1 or not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise ValueError(f'device = {name!r} is one GPU, but there are {self.count} ranks; write device = "cuda".')
        if self.local >= torch.cuda.device_count():
            raise ValueError(
                f"This machine has {torch.cuda.device_count()} GPUs and more ranks than that; "
                "start torchrun with --nproc-per-node equal to the number of GPUs."
            )
        return f"cuda:{self.local}"

    def any(self, flag: bool) -> bool:
        """Whether it is so at any rank."""
        if self.count == 1:
            return flag
        found = torch.tensor(int(flag))
        with self._talking():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def check(self, error: Exception | None) -> None:
        """Raises at every rank if one gives an error: there the error itself, elsewhere a TrainingError that quotes it."""
        if not self.any(error is not None):
            return
        if self.count > 1:
            reports = self._gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        rank = next(rank for rank, report in enumerate(reports) if report is not None)
        raise TrainingError(f"Rank {rank} stopped: {reports[rank]}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave the block together: if one fails in it, all raise."""
        failure = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - check raises it, on every rank
            failure = error
        self.check(failure)

    def agree(self, what: str, text: str) -> None:
        """TrainingError if `text` is not the same at all ranks."""
        if self.count == 1:
            return
        digests = self._gather(hashlib.blake2b(text.encode()).hexdigest())
        if strangers := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise TrainingError(
                f"Rank {strangers[0]} has another {what} than rank 0; give every machine the same config, files and versions."
            )

    def send(self, about: Any, tensors: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
        """What rank 0 gives, at every rank: anything small, and tensors on the CPU. The others' arguments do not matter."""
        if self.count == 1:
            return about, tensors
        with self._talking():
            message = [about, {key: (value.shape, value.dtype) for key, value in tensors.items()}]
            dist.broadcast_object_list(message, src=0)
            about, kinds = message
            if not self.first:
                tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in kinds.items()}
            for key in kinds:
                dist.broadcast(tensors[key], src=0)
        return about, tensors

    def sum(self, values: torch.Tensor) -> None:
        """In place, over all ranks."""
        with self._talking():
            dist.all_reduce(values)

    def _gather(self, item: Any) -> list[Any]:
        items: list[Any] = [None] * self.count
        with self._talking():
            dist.all_gather_object(items, item)
        return items

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # a closed connection, or silence for as long as TIMEOUT
            raise TrainingError(
                f"Rank {self.rank} lost the others: one was killed, its machine failed, or it was silent for too long; "
                f"look at their last messages and resume from the last state ({str(error).splitlines()[0]})."
            ) from error


@contextmanager
def joined(device: str, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """The ranks that the launcher's variables describe; a process alone without them.

    A process that leaves with an error closes its connections only by ending: closing them itself would wait for ranks that are stuck.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {count}, but {missing[0]} is not set; start several ranks with torchrun or accelerate launch."
        )
    ranks = Ranks(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(ranks.device(device))
        backend = "cpu:gloo,cuda:nccl"  # gradients over NCCL; words and flags on the CPU, without a wait for the GPU
    with ranks._talking():
        dist.init_process_group(backend, timeout=timeout)
    yield ranks
    dist.destroy_process_group()
