"""Many at once: eight clients with workflows of their own, who also cancel and make mistakes. Everybody gets the right picture.

FLEXIP_LOAD_SECONDS is how long the long run takes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import queue
import random
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import graphs
import psutil
import pytest
from conftest import PACK, REPO
from graphs import Graph, Link
from PIL import Image
from server import CPU_ARGUMENTS, ComfyServer, PromptError, link_folder

from flexip_core.evaluation.client import ServerError

CLIENTS = 8
SECONDS = float(os.environ.get("FLEXIP_LOAD_SECONDS", "600"))
SHARES = {"wait": 0.7, "cancel": 0.2, "mistake": 0.1}
LONGEST = 300  # seconds that a prompt may wait for those of the others
GROWTH = 0.01

Picture = list[tuple[tuple[int, int], bytes]]


@pytest.fixture(scope="module", autouse=True)
def other_adapters(models: Path) -> None:
    graphs.make_files(models, full=False)


def pictures(comfy: ComfyServer, outputs: dict) -> Picture:
    images = [Image.open(io.BytesIO(comfy.view(file))).convert("RGB") for file in outputs[graphs.PICTURE]["images"]]
    return [(image.size, image.tobytes()) for image in images]


class Load:
    """What the clients share: the server, the right answers, and when to stop."""

    def __init__(self, comfy: ComfyServer, pool: list[Graph]):
        self.comfy = comfy
        self.again = itertools.count(1)
        self.failed = threading.Event()
        self.right = {graph: pictures(comfy, comfy.run(self.prompt(graph)).outputs) for graph in pool}

    def prompt(self, graph: Graph) -> dict:
        return graphs.with_picture(graphs.prompt_of(graph, again=next(self.again)))

    def client(self, number: int, end: float) -> Counter[str]:
        rng, did = random.Random(number), Counter()
        try:
            for turn in itertools.count():
                if self.failed.is_set() or (turn >= len(SHARES) and time.monotonic() > end):
                    break
                once = list(SHARES)[turn] if turn < len(SHARES) else None  # each at least once
                action = once or rng.choices(list(SHARES), list(SHARES.values()))[0]
                did[getattr(self, action)(rng.choice(list(self.right)), rng)] += 1
        except BaseException:
            self.failed.set()
            raise
        return did

    def wait(self, graph: Graph, rng: random.Random) -> str:
        run = self.comfy.run(self.prompt(graph), timeout=LONGEST)
        assert pictures(self.comfy, run.outputs) == self.right[graph], graph
        prompts = {message["data"]["prompt_id"] for message in run.messages if "prompt_id" in message.get("data", {})}
        assert len(prompts) == 1, "a client was told of another's prompt"
        self.forget(prompts.pop())
        return "answered"

    def cancel(self, graph: Graph, rng: random.Random) -> str:
        """Out of the queue, or while it runs, or too late."""
        client_id = uuid.uuid4().hex  # without one the server tells everybody of the run
        prompt_id = self.comfy.queue(self.prompt(graph), client_id)
        time.sleep(rng.uniform(0, 3))
        self.comfy.interrupt(prompt_id)
        try:
            outputs = self.comfy.wait(prompt_id, timeout=LONGEST)
        except ServerError as error:
            assert "lost a prompt" in str(error)
            return "cancelled while it waited"
        except PromptError as error:
            assert str(error).endswith("interrupted")
            self.forget(prompt_id)
            return "cancelled while it ran"
        assert pictures(self.comfy, outputs) == self.right[graph], graph
        self.forget(prompt_id)
        return "answered before it could be cancelled"

    def mistake(self, graph: Graph, rng: random.Random) -> str:
        prompt, named = graphs.broken(self.prompt(graph), rng)
        with pytest.raises(PromptError, match=named) as error:
            self.comfy.run(prompt, timeout=LONGEST)
        if "node_errors" in error.value.details:
            return "refused"
        self.forget(error.value.details["prompt_id"])
        return "failed"

    def forget(self, prompt_id: str) -> None:
        """ComfyUI's history holds 10,000 prompts; it would be all that grows."""
        self.comfy.post("/history", {"delete": [prompt_id]})


@contextlib.contextmanager
def bystander(comfy: ComfyServer) -> Iterator[None]:
    """Watches without queueing anything; at the end it must have been told of nothing but the queue's length."""
    with comfy._websocket() as (_, received):
        yield
        messages = []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(received.get(timeout=1))
    kinds = Counter(message["type"] for message in messages)
    assert kinds.keys() <= {"status", "feature_flags"} and kinds["status"] > 1


def workflows(count: int) -> list[Graph]:
    """Different ones, each with a gate."""
    found = dict.fromkeys([Graph()])
    for graph in graphs.edits(Graph(), random.Random(count)):
        if graph.acting:
            found[replace(graph, also=None)] = None
        if len(found) == count:
            return list(found)


def crowd(load: Load, seconds: float) -> Counter[str]:
    """What eight clients did in that time, each of them rightly."""
    assert len({str(picture) for picture in load.right.values()}) > 0.6 * len(load.right)
    comfy = load.comfy
    with bystander(comfy), ThreadPoolExecutor(CLIENTS) as pool:
        end = time.monotonic() + seconds
        did = sum(pool.map(load.client, range(CLIENTS), [end] * CLIENTS), Counter())
    assert comfy.get("/queue") == {"queue_running": [], "queue_pending": []}
    for graph in list(load.right)[:4]:  # no interrupt is left over
        load.wait(graph, random.Random())
    assert did["answered"] >= CLIENTS and did["cancelled while it waited"] and did["refused"] and did["failed"], did
    return did


def test_eight_clients_at_once_all_get_their_own_pictures(comfy: ComfyServer) -> None:
    crowd(Load(comfy, workflows(8)), seconds=20)


@pytest.mark.long
def test_ten_minutes_of_eight_clients_do_not_grow_the_server(
    comfyui_tree: Path,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_testsuite_property: Callable[[str, str], None],
) -> None:
    """In a server that keeps the results of 100 nodes: the default keeps those of every run until the memory is short.

    Freed memory goes back to the system at once, where that is glibc's to decide: what it keeps back swings by a tenth.
    """
    import skimage.data

    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "65536")
    server = ComfyServer(comfyui_tree, tmp_path, packs={PACK: REPO}, arguments=[*CPU_ARGUMENTS, "--cache-lru", "100"])
    link_folder(models, tmp_path / "models")
    shutil.copyfile(Path(skimage.data.__file__).parent / graphs.REFERENCE, tmp_path / "input" / graphs.REFERENCE)
    with server:
        load, process = Load(server, workflows(48)), psutil.Process(server.process.pid)

        def settled() -> int:
            """Resident memory after the same prompts in the same order, with nothing left to do."""
            for graph in load.right:
                load.wait(graph, random.Random())
            time.sleep(2)
            return process.memory_info().rss

        crowd(load, SECONDS / 10)  # whatever is made once
        before = settled()
        did = crowd(load, SECONDS)
        after = settled()
    growth = after / before - 1
    text = f"{dict(did)} in {SECONDS:.0f} s; memory {before / 2**20:.0f} and then {after / 2**20:.0f} MB, {growth:+.2%}"
    record_testsuite_property("load", text)
    assert growth <= GROWTH, text


def test_words_about_a_run_go_to_nobody_else(comfy: ComfyServer) -> None:
    """A page that shows the same workflow would hang another's warnings on its own nodes."""
    with bystander(comfy):
        run = comfy.run(graphs.prompt_of(Graph(links=(Link(strength=0.0), Link()), seed=77)))
    assert "flexip.warnings" in {message["type"] for message in run.messages}


def test_an_interrupt_of_a_prompt_that_nobody_waits_for_ends_no_other(comfy: ComfyServer) -> None:
    """ComfyUI tells it to every client, whose own prompt still waits."""
    endless = comfy.queue(graphs.prompt_of(Graph(steps=500, seed=78)))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(comfy.run, graphs.prompt_of(Graph(seed=79)))
        while not comfy.get("/queue")["queue_pending"] and not waiting.done():
            time.sleep(0.05)
        comfy.interrupt(endless)
        assert waiting.result().outputs
    with pytest.raises(PromptError, match="interrupted"):
        comfy.wait(endless)
