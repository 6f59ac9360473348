"""The pictures of a benchmark from a real server, with the mini models and with the demo world."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from PIL import Image
from server import ComfyServer

from flexip_core.evaluation.benchmark import Benchmark, Case, Subject, find_pictures
from flexip_core.evaluation.client import ServerError
from flexip_core.evaluation.generate import Outcome, Progress, generate
from flexip_core.evaluation.recipe import DEMO, read_recipe
from flexip_core.untrained import mini

GATES = (0.0, 0.5, 1.0)
SETTINGS = {
    "checkpoint": mini.MINI_BASE,
    "adapters": mini.MINI_FLEXIP,
    "steps": 2,
    "width": 64,
    "height": 64,
}
WORLD = REPO / "flexip_core" / "evaluation" / DEMO
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    """2 subjects, 2 prompts, in words of the demo world."""
    folder, cases = tmp_path_factory.mktemp("benchmark"), []
    for number, name in enumerate(("disc", "cross")):
        path = folder / name / "00.png"
        path.parent.mkdir()
        noise = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64), Image.Resampling.NEAREST).save(path)
        subject = Subject(name, "shape", (path,), name)
        cases += [Case(subject, i, f"a {name} on {ground}, top left") for i, ground in enumerate(("sand", "grass"))]
    return Benchmark("two by two", tuple(cases))


@pytest.fixture(scope="module")
def made(comfy: ComfyServer, models: Path, two_by_two: Benchmark, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole benchmark, with a server that does not answer beside the one that does."""
    folder = tmp_path_factory.mktemp("made") / "flexip"
    urls = [NOBODY, comfy.url]
    outcome = generate(two_by_two, folder, urls, None, GATES, settings=SETTINGS, on_progress=quiet, models=models)
    assert outcome == Outcome(made=12, kept=0)
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def prompts_of(comfy: ComfyServer) -> int:
    return len(comfy.get("/history"))


def quiet(done: int, total: int) -> None:
    """Instead of the bar."""


def test_everything_is_there_and_the_header_says_from_what(made: Path, two_by_two: Benchmark, models: Path) -> None:
    found = find_pictures(two_by_two, made, images=1)
    assert [picture.gate for picture in found] == [gate for gate in GATES for _ in range(4)]
    for picture in found:
        assert pixels(picture.path).shape == (64, 64, 3) and pixels(picture.path).std() > 5
        tree = picture.path.parents[1]
        assert (tree / "text" / f"{picture.path.stem}.txt").read_text() == picture.case.prompt
        assert (tree / "src_image" / picture.path.name).read_bytes() == picture.case.subject.references[0].read_bytes()
    head = json.loads((made / "run.json").read_text())
    assert (head["steps"], head["width"], head["knob"], head["gates"]) == (2, 64, "gate", list(GATES))
    hashes = {entry["name"]: entry["sha256"] for entry in head["files"].values()}
    assert hashes.keys() == {mini.MINI_BASE, mini.MINI_FLEXIP, mini.MINI_CLIP_FILE, mini.MINI_DINO_FILE}
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes.values())
    assert len(head["servers"]) == 1 and head["servers"][0]["comfyui"]
    assert "3 of 3" not in head["report"] and "gate 0, 0.5, 1" in head["report"]


def test_gate_subject_and_prompt_act_in_the_pictures(made: Path) -> None:
    at = {
        path: pixels(made / path)
        for path in (
            "gate_0.00/tgt_image/disc-00-0.png",
            "gate_1.00/tgt_image/disc-00-0.png",
            "gate_1.00/tgt_image/disc-01-0.png",
        )
    }
    first, *others = at.values()
    assert all(np.abs(first - other).mean() > 1 for other in others)


def test_the_same_command_again_runs_nothing(
    made: Path, comfy: ComfyServer, models: Path, two_by_two: Benchmark
) -> None:
    before = prompts_of(comfy)
    outcome = generate(
        two_by_two, made, [NOBODY], None, GATES, settings=SETTINGS, on_progress=quiet, models=models
    )  # not even a server is needed
    assert outcome == Outcome(made=0, kept=12) and prompts_of(comfy) == before


def test_a_deleted_picture_is_made_again_and_is_the_same(
    made: Path, comfy: ComfyServer, models: Path, two_by_two: Benchmark
) -> None:
    victim = made / "gate_0.50" / "tgt_image" / "cross-01-0.png"
    before, prompts = pixels(victim), prompts_of(comfy)
    victim.unlink()
    outcome = generate(two_by_two, made, [comfy.url], None, GATES, settings=SETTINGS, on_progress=quiet, models=models)
    assert outcome == Outcome(made=3, kept=9) and prompts_of(comfy) == prompts + 1
    assert np.array_equal(pixels(victim), before)


def test_a_changed_setting_is_refused(made: Path, comfy: ComfyServer, two_by_two: Benchmark) -> None:
    prompts = prompts_of(comfy)
    with pytest.raises(ValueError, match=r"FlexIPSampler \(9\) steps: 2 there, 3 now"):
        generate(two_by_two, made, [comfy.url], None, GATES, settings={**SETTINGS, "steps": 3}, on_progress=quiet)
    assert prompts_of(comfy) == prompts


def test_the_same_seed_is_the_same_picture_and_another_is_not(
    made: Path, comfy: ComfyServer, two_by_two: Benchmark, tmp_path: Path
) -> None:
    one = Benchmark("one", two_by_two.cases[:1])
    name = "gate_0.50/tgt_image/disc-00-0.png"
    for seed in (0, 1):
        generate(
            one,
            tmp_path / str(seed),
            [comfy.url],
            None,
            GATES,
            seed=seed,
            settings=SETTINGS,
            on_progress=quiet,
            at_once=2,
        )
    assert np.abs(pixels(tmp_path / "0" / name) - pixels(made / name)).max() <= 1, "in whatever company it is sampled"
    assert np.abs(pixels(tmp_path / "1" / name) - pixels(made / name)).mean() > 2


def test_a_file_that_the_server_lacks_is_a_sentence(comfy: ComfyServer, two_by_two: Benchmark, tmp_path: Path) -> None:
    settings = {**SETTINGS, "adapters": "none.safetensors"}
    with pytest.raises(ServerError, match=r"LoadFlexIPAdapters \(6\): .*preservation"):
        generate(two_by_two, tmp_path, [comfy.url], None, GATES, settings=settings, on_progress=quiet)


def test_a_failing_node_is_a_sentence(comfy: ComfyServer, two_by_two: Benchmark, tmp_path: Path) -> None:
    settings = {**SETTINGS, "ApplyFlexIPGate.strength": 0.0}
    with pytest.raises(ServerError, match="FlexIPSampler failed: .*Raise its strength"):
        generate(two_by_two, tmp_path, [comfy.url], None, GATES, settings=settings, on_progress=quiet)


def test_ctrl_c_clears_the_servers_queue_and_the_folder_goes_on(
    comfy: ComfyServer, two_by_two: Benchmark, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    def run(on_progress: Progress) -> Outcome:
        settings = {"steps": 60}
        return generate(two_by_two, tmp_path, [comfy.url], WORLD, GATES, settings=settings, on_progress=on_progress)

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    queue = comfy.get("/queue")
    assert queue["queue_running"] == queue["queue_pending"] == []
    outcome = run(quiet)
    assert outcome.made + outcome.kept == 12 and 3 <= outcome.kept < 12


@pytest.mark.parametrize(("knob", "values"), [("gate", (0.0, 1.0)), ("strength", (0.0, 0.5, 1.0)), ("gate", ())])
def test_the_demo_world_too(
    comfy: ComfyServer, two_by_two: Benchmark, tmp_path: Path, knob: str, values: tuple[float, ...]
) -> None:
    outcome = generate(
        two_by_two, tmp_path, [comfy.url], WORLD, values, settings={"steps": 4}, on_progress=quiet, knob=knob
    )
    assert outcome.made == 4 * max(1, len(values))
    found = find_pictures(two_by_two, tmp_path, images=1)
    assert sorted({picture.gate for picture in found}, key=str) == list(values or (None,))
    first, last = (pixels(picture.path) for picture in (found[0], found[-4]))
    assert not values or np.abs(first - last).mean() > 1


def test_a_workflow_of_the_page_is_taken(comfy: ComfyServer, two_by_two: Benchmark, tmp_path: Path) -> None:
    """The shipped gate sweep, with VAE Decode and Save Image in place of its contact sheet."""
    workflow = json.loads((REPO / "workflows" / "flexip_gate_sweep.json").read_text())
    with pytest.raises(ValueError, match="no SaveImage node for pictures"):
        read_recipe(REPO / "workflows" / "flexip_gate_sweep.json", {}, comfy.object_info)
    [save] = (node for node in workflow["nodes"] if node["type"] == "SaveImage")
    [sampler] = (node for node in workflow["nodes"] if node["type"] == "FlexIPSampler")
    [loader] = (node for node in workflow["nodes"] if node["type"] == "CheckpointLoaderSimple")
    inputs = [{"name": "samples", "link": 901}, {"name": "vae", "link": 902}]
    workflow["nodes"].append({"id": 900, "type": "VAEDecode", "inputs": inputs, "widgets_values": []})
    workflow["links"] += [
        [901, sampler["id"], 0, 900, 0, "LATENT"],
        [902, loader["id"], 2, 900, 1, "VAE"],
        [903, 900, 0, save["id"], 0, "IMAGE"],
    ]
    save["inputs"][0]["link"] = 903
    path = tmp_path / "own.json"
    path.write_text(json.dumps(workflow))
    settings = {"steps": 2, "width": 64, "height": 64}
    one = Benchmark("one", two_by_two.cases[:1])
    generate(one, tmp_path / "out", [comfy.url], path, GATES, settings=settings, on_progress=quiet)
    assert len(find_pictures(one, tmp_path / "out", images=1)) == 3
