"""Several ComfyUI servers that share the work: one that fails gives its work back to the others."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from .client import ComfyClient, PromptError, ServerError

log = logging.getLogger(__name__)

AHEAD = 2  # prompts at a time per server: one runs while the pictures of another are fetched
LAST_SECONDS = 5.0  # for the threads to end once they are stopped

Job = TypeVar("Job")


@dataclass(eq=False)
class Server:
    client: ComfyClient
    stats: Mapping[str, Any] = field(default_factory=dict)
    failure: ServerError | PromptError | None = None  # why it gets no more work
    uploaded: dict[Path, str] = field(default_factory=dict)
    queued: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def upload(self, picture: Path, name: Callable[[bytes], str], folder: str) -> str:
        """Each picture once, under a name by content, so that another run finds it there."""
        with self.lock:
            if picture not in self.uploaded:
                data = picture.read_bytes()
                self.uploaded[picture] = self.client.upload(data, name(data), folder)
            return self.uploaded[picture]

    def run(self, prompt: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Queues a prompt, and waits for its outputs."""
        prompt_id = self.client.queue(prompt)
        self.queued.add(prompt_id)
        try:
            return self.client.wait(prompt_id)
        finally:
            self.queued.discard(prompt_id)


def as_crew(urls: Sequence[str]) -> list[Server]:
    servers = {server.client.url: server for server in (Server(ComfyClient(url)) for url in urls)}
    if not servers:
        raise ValueError("Give the address of a running ComfyUI, such as http://127.0.0.1:8188.")
    return list(servers.values())


def reachable(crew: Sequence[Server]) -> list[Server]:
    """ServerError with the reasons, if there is none."""
    for server in crew:
        if server.stats or server.failure:
            continue  # asked before
        try:
            server.stats = server.client.system_stats()
        except ServerError as error:
            server.failure = error
            if len(crew) > 1:
                log.warning("%s", error)
    found = [server for server in crew if server.failure is None]
    if not found:
        raise ServerError("\n".join(str(server.failure) for server in crew))
    return found


def share(
    jobs: Sequence[Job],
    crew: Sequence[Server],
    make: Callable[[Server, Job], Any],
    finished: Callable[[Job, Any], None],
) -> None:
    """`make` runs in threads, `finished` gets its result in this one. ServerError once no server is left.

    Ctrl+C and every other error take the prompts out of the servers' queues.
    """
    work: _Work[Job] = _Work(jobs)
    events: queue.Queue[Any] = queue.Queue()
    threads = [
        threading.Thread(target=_serve, args=(server, work, make, events), daemon=True)
        for server in crew
        for _ in range(AHEAD)
    ]
    left, running = len(jobs), len(threads)
    try:
        for thread in threads:
            thread.start()
        while running:
            event = _next(events)
            if event is None:
                running -= 1
            elif isinstance(event, Exception):
                raise event
            elif isinstance(event, Server):
                if len(crew) > 1:
                    log.warning("%s gets no more work: %s", event.client.url, event.failure)
            else:
                left -= 1
                finished(*event)
    finally:
        work.stop()
        deadline = time.monotonic() + LAST_SECONDS
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            _clear(crew)  # again and again: a thread may just have been about to queue a prompt
            time.sleep(0.05)
    if left:
        raise ServerError("\n".join(f"{server.client.url}: {server.failure}" for server in crew))


def _serve(server: Server, work: _Work[Job], make: Callable[[Server, Job], Any], events: queue.Queue[Any]) -> None:
    try:
        while server.failure is None and (job := work.take()) is not None:
            try:
                result = make(server, job)
            except BaseException:
                work.give_back(job)
                raise
            work.done()
            events.put((job, result))
    except (ServerError, PromptError) as error:
        if server.failure is None and not work.stopped:
            server.failure = error
            events.put(server)
    except Exception as error:  # noqa: BLE001 - the main thread raises it
        events.put(error)
    events.put(None)


class _Work(Generic[Job]):
    """Jobs that threads take, and finish or give back."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._left, self._running = deque(jobs), 0
        self._changed = threading.Condition()
        self.stopped = False

    def take(self) -> Job | None:
        """Waits while others may still give something back; None when there are no more."""
        with self._changed:
            while self._running and not self._left and not self.stopped:
                self._changed.wait()
            if self.stopped or not self._left:
                return None
            self._running += 1
            return self._left.popleft()

    def done(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def give_back(self, job: Job) -> None:
        with self._changed:
            self._left.appendleft(job)
            self._running -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


def _next(events: queue.Queue[Any]) -> Any:
    while True:
        with contextlib.suppress(queue.Empty):
            return events.get(timeout=0.5)  # without a timeout Windows would not hear Ctrl+C


def _clear(crew: Sequence[Server]) -> None:
    """Takes our prompts out of the queues of the servers that still answer."""
    for server in crew:
        for prompt_id in () if isinstance(server.failure, ServerError) else list(server.queued):
            with contextlib.suppress(ServerError):
                server.client.interrupt(prompt_id)
