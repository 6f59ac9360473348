"""The line on the screen of who watches a run: how fast it is, what it waits for, how long it still takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .loop import Step, Trainer

WINDOW = 20  # steps


@contextmanager
def progress_line(trainer: Trainer) -> Iterator[Callable[[Step], None]]:
    """For Trainer.run's `on_step`. Only on a terminal, and only rank 0's; a file gets the lines of the log."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    if not trainer.ranks.first:
        yield lambda step: None
        return
    recent: deque[Step] = deque(maxlen=WINDOW)
    with tqdm(total=trainer.cfg.steps, unit="step", dynamic_ncols=True, disable=None) as bar, logging_redirect_tqdm():

        def shown(step: Step) -> None:
            recent.append(step)
            if not bar.disable:
                bar.set_postfix_str(words(recent, trainer.cfg.batch, trainer.device), refresh=False)
                bar.update(step.number + 1 - bar.n)

        yield shown


def words(steps: Sequence[Step], batch: int, device: torch.device) -> str:
    """Of these steps: seconds of one, samples of all ranks per second, the share that was waiting for data, loss, rate, memory."""
    seconds = sum(step.seconds for step in steps)
    parts = [
        f"{seconds / len(steps):.2f} s/step",
        f"{batch * len(steps) / seconds:.1f} samples/s",
        f"data {sum(step.waited for step in steps) / seconds:.0%}",
        f"loss {sum(step.loss for step in steps) / len(steps):.4f}",
        f"lr {steps[-1].lr:.2g}",
    ]
    if device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")
    return ", ".join(parts)
