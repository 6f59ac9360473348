"""The wish to stop, as people and schedulers say it: the step that runs is finished and the state is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTS = 3  # Ctrl+C so often ends the process at once


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """SIGTERM and SIGINT set the event while it lasts.

    More of them change nothing: torchrun passes on what it gets, so a scheduler that signals the whole job (SLURM, systemd) sends
    two. Who has no patience sends SIGKILL, as those do, or the third SIGINT.
    """
    event, interrupts = threading.Event(), 0
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    own = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: Any) -> None:
        nonlocal interrupts
        event.set()
        interrupts += number == signal.SIGINT
        if interrupts == INTERRUPTS - 1:
            signal.signal(signal.SIGINT, own[signal.SIGINT])

    for number in own:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
