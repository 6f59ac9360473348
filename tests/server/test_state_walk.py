"""Users' row 7: adapter state that leaks between runs, branches and workflows, and gives wrong pictures without an error.

Whatever a server did before, a graph gives what it gives in a fresh process, bit for bit, and memory does not grow.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import shutil
from collections import Counter
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
from hypothesis import HealthCheck, assume, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from PIL import Image
from server import ComfyServer, PromptError, Run, link_folder

TOGETHER = 2  # fresh servers at once


@pytest.fixture(scope="module", autouse=True)
def other_adapters(models: Path) -> None:
    graphs.make_files(models, full=False)


def digests(comfy: ComfyServer, run: Run) -> dict[str, str]:
    """By saving node, what identifies its latents or pictures to the last bit."""
    found = {}
    for node in {graphs.SAVED, graphs.SAVED_ALSO, graphs.MAPS, graphs.SCORES} & run.outputs.keys():
        output = run.outputs[node]
        files = [comfy.view(file) for file in [*output.get("latents", []), *output.get("images", [])]]
        if "latents" in output:
            values = [safetensors.torch.load(file)["latent_tensor"].numpy() for file in files]
        else:
            values = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        assert values and all(np.isfinite(value).all() for value in values), node
        parts = [f"{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}" for value in values]
        found[node] = " ".join([*parts, *output.get("text", [])])
    return found


class Walk:
    """A server, and what every graph gave in it the first time."""

    def __init__(self, comfy: ComfyServer):
        self.comfy = comfy
        self.known: dict[Result, str] = {}
        self.queued = 0
        self.did: Counter[str] = Counter()

    def run(self, graph: Graph, on_message: Callable[[dict[str, Any]], None] | None = None) -> Run:
        self.queued += 1
        return self.comfy.run(graphs.prompt_of(graph, again=self.queued), on_message)

    def check(self, graph: Graph) -> None:
        """It samples again, and every result is what it was before, whichever graph had it."""
        run = self.run(graph)
        executed = {message["data"].get("node") for message in run.messages if message["type"] == "executing"}
        assert executed & {"sample", "sample also"}  # one for both if they are the same
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


RANDOM = st.randoms(use_true_random=False)  # drawn by hypothesis, so that it can make a failure smaller


class Page(RuleBasedStateMachine):
    """What an artist does with a workflow. After each step it is queued, and gives what it gave before."""

    def __init__(self, walk: Walk):
        super().__init__()
        self.walk, self.graph, self.seen = walk, Graph(), [Graph()]

    @initialize(wanted=st.booleans())
    def opens(self, wanted: bool) -> None:
        """Not hypothesis' first example, which is the simplest everywhere: the same edit again and again."""
        assume(wanted)

    def turn_to(self, graph: Graph) -> None:
        self.graph = graph
        self.seen.append(graph)
        self.walk.did["edit"] += 1

    @rule(rng=RANDOM)
    def edits_a_link(self, rng: random.Random) -> None:
        self.turn_to(graphs.edit_link(self.graph, rng))

    @rule(rng=RANDOM)
    def edits_the_chain(self, rng: random.Random) -> None:
        self.turn_to(graphs.edit_chain(self.graph, rng))

    @rule(rng=RANDOM)
    def edits_the_conditioning(self, rng: random.Random) -> None:
        self.turn_to(graphs.edit_own(self.graph, rng))

    @rule(rng=RANDOM)
    def edits_the_rest(self, rng: random.Random) -> None:
        self.turn_to(graphs.edit_rest(self.graph, rng))

    @rule(rng=RANDOM)
    def goes_back(self, rng: random.Random) -> None:
        self.turn_to(rng.choice(self.seen))

    @rule()
    def interrupts(self) -> None:
        self.walk.did["interrupt"] += self.walk.interrupt(self.graph, step=1)

    @precondition(lambda self: self.graph.acting)
    @rule(rng=RANDOM)
    def makes_a_mistake(self, rng: random.Random) -> None:
        self.walk.mistake(self.graph, rng)
        self.walk.did["mistake"] += 1

    @invariant()
    def it_gives_what_it_gave(self) -> None:
        self.walk.check(self.graph)


class PageOfTwoBases(Page):
    @rule()
    def tries_it_with_the_other_base(self) -> None:
        self.walk.check(replace(self.graph, base=graphs.SD15))
        self.walk.did["other base"] += 1


@pytest.mark.parametrize(
    "edits, steps, anew, processes", [(25, 12, 6, 1), pytest.param(500, 80, 44, 44, marks=pytest.mark.long)]
)
def test_every_graph_of_a_walk_gives_what_a_fresh_process_gives(
    comfyui_tree: Path,
    base: Path,
    models: Path,
    comfy: ComfyServer,
    tmp_path: Path,
    edits: int,
    steps: int,
    anew: int,
    processes: int,
    record_testsuite_property: Callable[[str, str], None],
) -> None:
    walk, page = Walk(comfy), Page
    if processes > 1:
        graphs.make_files(models, full=True)
        page = PageOfTwoBases
    walk.check(BARE)
    for number in itertools.count():
        # Of one example each: hypothesis makes further ones from the first, which are like it.
        run_state_machine_as_test(
            seed(number)(lambda: page(walk)),
            settings=settings(
                max_examples=1,
                stateful_step_count=steps,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        if walk.did["edit"] >= edits:
            break
    walk.check(BARE)
    record_testsuite_property("walk", f"{dict(walk.did)}, {walk.queued} queued, {len(walk.known)} results")
    assert walk.did["interrupt"] and walk.did["mistake"], walk.did
    assert len(set(walk.known.values())) > 0.4 * len(walk.known) > 0.2 * edits  # most edits show

    sampled = random.Random(9).sample(sorted(walk.known, key=str), anew)
    fresh = in_fresh_processes(comfyui_tree, base, tmp_path, sampled, processes)
    assert [result for result in sampled if fresh[result] != walk.known[result]] == []
    assert len({fresh[result] for result in sampled}) > 0.4 * anew


CHAIN = Graph(links=(Link(0.2), Link(0.9, adapters=1, reference=Reference("inverted"))))


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
