"""Users' row 7: adapter state that leaks between runs, branches and workflows, and gives wrong pictures without an error.

Whatever a server did before, a graph gives what it gives in a fresh process, bit for bit, and memory does not grow.
"""

from __future__ import annotations

import hashlib
import io
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import psutil
import pytest
import safetensors.torch
from conftest import PACK, REPO
from graphs import BARE, Graph, Link, Own, Reference, Result
from PIL import Image
from server import ComfyServer, PromptError, Run, link_folder

from flexip_core import mini

INTERRUPTED, MISTAKEN, RETURNED = 0.1, 0.05, 0.2  # shares of the edits
TOGETHER = 2  # fresh servers at once


@pytest.fixture(scope="module", autouse=True)
def other_adapters(models: Path) -> None:
    mini.make_mini_flexip(models / "flexip" / graphs.OTHER_FLEXIP, seed=1)


def digests(comfy: ComfyServer, run: Run) -> dict[str, str]:
    """By saving node, what identifies its latents or pictures to the last bit."""
    found = {}
    for node in {graphs.SAVED, graphs.SAVED_ALSO, graphs.MAPS} & run.outputs.keys():
        output = run.outputs[node]
        files = [comfy.view(file) for file in [*output.get("latents", []), *output.get("images", [])]]
        if "latents" in output:
            values = [safetensors.torch.load(file)["latent_tensor"].numpy() for file in files]
        else:
            values = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        assert values and all(np.isfinite(value).all() for value in values), node
        found[node] = " ".join(f"{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}" for value in values)
    return found


class Walk:
    """A server, and what every graph gave in it the first time."""

    def __init__(self, comfy: ComfyServer):
        self.comfy = comfy
        self.known: dict[Result, str] = {}
        self.queued = 0

    def run(self, graph: Graph, on_message: Callable[[dict[str, Any]], None] | None = None) -> Run:
        self.queued += 1
        return self.comfy.run(graphs.prompt_of(graph, again=self.queued), on_message)

    def check(self, graph: Graph) -> None:
        """It samples again, and every result is what it was before, whichever graph had it."""
        run = self.run(graph)
        executed = {message["data"].get("node") for message in run.messages if message["type"] == "executing"}
        assert "sample" in executed
        found, wanted = digests(self.comfy, run), graph.results()
        assert found.keys() == wanted.keys()
        for node, result in wanted.items():
            assert found[node] == self.known.setdefault(result, found[node]), f"{node} of run {self.queued}: {graph}"

    def interrupt(self, graph: Graph, step: int) -> bool:
        """Queues it and interrupts it at that step; False if it was done before."""
        sent = []

        def on_message(message: dict[str, Any]) -> None:
            if not sent and message["type"] == "progress" and message["data"]["value"] >= step:
                sent.append(message["data"]["prompt_id"])
                self.comfy.interrupt(sent[0])

        try:
            self.run(graph, on_message)
        except PromptError as error:
            assert str(error).endswith("interrupted") and sent
            return True
        return False

    def mistake(self, graph: Graph, rng: random.Random) -> None:
        prompt, named = graphs.broken(graphs.prompt_of(graph), rng)
        with pytest.raises(PromptError, match=named):
            self.comfy.run(prompt)


def in_fresh_processes(
    comfyui_tree: Path, base: Path, folder: Path, results: list[Result], processes: int
) -> dict[Result, str]:
    """The results once more, spread over so many servers that have done nothing yet."""

    def of_server(number: int) -> dict[Result, str]:
        server = ComfyServer(comfyui_tree, folder / str(number), packs={PACK: REPO})
        link_folder(base / "models", server.base / "models")
        shutil.copyfile(base / "input" / graphs.REFERENCE, server.base / "input" / graphs.REFERENCE)
        with server:
            return {
                result: digests(server, server.run(graphs.prompt_of(result.graph)))[result.node]
                for result in results[number::processes]
            }

    with ThreadPoolExecutor(TOGETHER) as pool:
        return {key: value for part in pool.map(of_server, range(processes)) for key, value in part.items()}


@pytest.mark.parametrize(
    "edits, anew, processes", [(25, 6, 1), pytest.param(500, 44, 44, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_every_graph_of_a_walk_gives_what_a_fresh_process_gives(
    comfyui_tree: Path, base: Path, comfy: ComfyServer, tmp_path: Path, edits: int, anew: int, processes: int
) -> None:
    rng = random.Random(9)
    walk, graph, seen = Walk(comfy), Graph(), [Graph()]
    walk.check(BARE)
    walk.check(graph)
    for _ in range(edits):
        graph = rng.choice(seen) if rng.random() < RETURNED else graphs.edit(graph, rng)
        seen.append(graph)
        if rng.random() < INTERRUPTED:
            walk.interrupt(graph, step=1)
        if graph.acting and rng.random() < MISTAKEN:
            walk.mistake(graph, rng)
        walk.check(graph)
    walk.check(BARE)
    assert len(set(walk.known.values())) > 0.4 * len(walk.known) > 0.2 * edits  # most edits show

    sampled = rng.sample(sorted(walk.known, key=str), anew)
    fresh = in_fresh_processes(comfyui_tree, base, tmp_path, sampled, processes)
    assert [result for result in sampled if fresh[result] != walk.known[result]] == []
    assert len({fresh[result] for result in sampled}) > 0.4 * anew


CHAIN = Graph(links=(Link(0.2), Link(0.9, adapters=graphs.OTHER_FLEXIP, reference=Reference("inverted"))))


@pytest.mark.parametrize(
    "graph",
    [
        Graph(steps=6),
        replace(CHAIN, steps=6),
        replace(CHAIN, steps=6, sampler="FlexIPSampler", gates="0, 1", own=Own(0.3), also=1),
    ],
    ids=["one", "chain", "sweep beside the first link"],
)
@pytest.mark.parametrize("times", [3, pytest.param(17, marks=pytest.mark.long)])
def test_an_interrupt_at_any_step_leaves_nothing(comfy: ComfyServer, graph: Graph, times: int) -> None:
    rng = random.Random(times)
    walk = Walk(comfy)
    bare = replace(BARE, steps=graph.steps)
    walk.check(bare)
    walk.check(graph)
    interrupted = 0
    for _ in range(2 * times):
        interrupted += walk.interrupt(graph, step=rng.randrange(1, graph.steps))
        walk.check(rng.choice((bare, graph)))
        if interrupted == times:
            break
    assert interrupted == times
    walk.check(bare)
    walk.check(graph)


@pytest.mark.long
def test_memory_does_not_grow_over_re_queues(comfy: ComfyServer) -> None:
    """The slope of a line through the resident memory after each of the re-queues 50 to 200, so that noise of single ones averages out."""
    rng = random.Random(3)
    walk, process, memory = Walk(comfy), psutil.Process(comfy.process.pid), []
    for number in range(200):
        first = replace(CHAIN.links[0], gate=rng.random(), strength=0.5 + rng.random())
        walk.run(replace(CHAIN, links=(first, CHAIN.links[1]), seed=number, text=graphs.TEXTS[number % 3]))
        memory.append(process.memory_info().rss)
    slope, _ = np.polyfit(np.arange(50, 200), memory[50:], 1)
    assert slope * 150 <= 0.01 * np.mean(memory[50:]), [round(value / 2**20) for value in memory[::10]]
