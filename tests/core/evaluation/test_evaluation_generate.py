"""Making the pictures of a benchmark, with servers that only pretend to be ComfyUI."""

from __future__ import annotations

import io
import json
import re
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from flexip_core.evaluation import client as client_module
from flexip_core.evaluation.benchmark import Benchmark, Case, Subject
from flexip_core.evaluation.client import ComfyClient, PromptError, ServerError
from flexip_core.evaluation.generate import Outcome, generate, seed_of
from flexip_core.evaluation.recipe import make_recipe, read_recipe
from flexip_core.evaluation.workflow import nodes_of

FILES = {"checkpoint": "base.safetensors", "adapters": "adapters.safetensors"}
GATES = (0.0, 0.5, 1.0)


class FakeComfy:
    """Answers as ComfyUI does; the picture of a gate has the seed's and the gate's colour."""

    def __init__(self) -> None:
        self.prompts: list[dict] = []
        self.uploads: list[str] = []
        self.interrupted: list[str] = []
        self.requests = 0
        self.dies_after: int | None = None  # prompts
        self.finishes: int | None = None  # so many prompts, the others run for ever
        self.running: list[str] = []
        self.error: dict | None = None  # of a node
        self.refusal: dict | None = None
        self.pictures_too_few = 0
        self.history: dict[str, dict] = {}
        self.images: dict[str, bytes] = {}
        self.lock = threading.Lock()  # one prompt after the other, or the number that finishes would be left to chance
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake._answer(self, b"")

            def do_POST(self) -> None:
                fake._answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def is_dead(self) -> bool:
        return self.dies_after is not None and len(self.prompts) > self.dies_after

    def _answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.requests += 1
        url = urlsplit(handler.path)
        status, data = 200, b""
        if url.path == "/system_stats":
            data = {"system": {"comfyui_version": "0.30.0", "pytorch_version": "2.8"}, "devices": [{"name": "cpu"}]}
        elif url.path == "/upload/image":
            name = re.search(rb'filename="(.+?)"', body)[1].decode()
            folder = re.search(rb'name="subfolder"\r\n\r\n(.+?)\r\n', body)[1].decode()
            self.uploads.append(f"{folder}/{name}")
            data = {"name": name, "subfolder": folder, "type": "input"}
        elif url.path == "/prompt":
            with self.lock:
                status, data = self._queue(json.loads(body)["prompt"])
        elif url.path.startswith("/history/"):
            key = url.path.removeprefix("/history/")
            data = {key: self.history[key]} if key in self.history else {}
        elif url.path == "/queue" and handler.command == "GET":
            data = {"queue_running": [[0, key] for key in self.running], "queue_pending": []}
        elif url.path == "/interrupt":
            key = json.loads(body)["prompt_id"]
            self.interrupted.append(key)
            if key in self.running:
                self.running.remove(key)
                self.history[key] = {
                    "outputs": {},
                    "status": {"messages": [["execution_interrupted", {"node_type": "K"}]]},
                }
        elif url.path == "/view":
            data = self.images[parse_qs(url.query)["filename"][0]]
        if self.is_dead:
            handler.close_connection = True
            return
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _queue(self, prompt: dict) -> tuple[int, dict]:
        if self.refusal:
            return 400, self.refusal
        self.prompts.append(prompt)
        key = str(uuid.uuid4())
        if self.error:
            self.history[key] = {"outputs": {}, "status": {"messages": [["execution_error", self.error]]}}
        elif self.finishes is not None and len(self.prompts) > self.finishes:
            self.running.append(key)
        elif not self.is_dead:
            self.history[key] = {"outputs": self._outputs(prompt), "status": {"messages": []}}
        return 200, {"prompt_id": key, "node_errors": {}}

    def _outputs(self, prompt: dict) -> dict[str, Any]:
        [sampler] = nodes_of(prompt, "FlexIPSampler")
        inputs = prompt[sampler]["inputs"]
        values = [float(word) for word in (inputs["gates"] or inputs["strengths"] or "0.6").split(",")]
        names = []
        for value in values[self.pictures_too_few :]:
            name = f"{uuid.uuid4()}.png"
            out = io.BytesIO()
            Image.new("RGB", (4, 4), (inputs["seed"] % 256, int(value * 50), 0)).save(out, "PNG")
            self.images[name] = out.getvalue()
            names.append({"filename": name, "subfolder": "", "type": "temp"})
        report = f"adapters: x.\nencoders: clip.safetensors ({inputs['steps']} steps)"
        return {nodes_of(prompt, "PreviewImage")[0]: {"images": names}, "flexip_report": {"text": [report]}}


@pytest.fixture
def fakes() -> Iterator[list[FakeComfy]]:
    found = [FakeComfy(), FakeComfy()]
    yield found
    for fake in found:
        fake.server.shutdown()
        fake.server.server_close()


@pytest.fixture
def fake(fakes: list[FakeComfy]) -> FakeComfy:
    return fakes[0]


@pytest.fixture
def benchmark_of_four(tmp_path: Path) -> Benchmark:
    """2 subjects with 2 pictures each, 2 prompts."""
    cases = []
    for number, name in enumerate(("cat", "red vase")):
        references = []
        for picture in range(2):
            path = tmp_path / "benchmark" / name / f"{picture:02d}.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (90 * number, 90 * picture, 50)).save(path, "JPEG")
            references.append(path)
        subject = Subject(name, "thing", tuple(references), "vase")
        cases += [Case(subject, i, f"a {name} {place}") for i, place in enumerate(("on a beach", "in snow"))]
    return Benchmark("two subjects", tuple(cases))


def pictures(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("**/tgt_image/*"))


def header(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_one_prompt_per_case_makes_all_gates_in_the_layout_of_dreambench_plus(
    fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    outcome = generate(
        benchmark_of_four, out, [fake.url], None, GATES, settings=FILES, on_progress=lambda *now: seen.append(now)
    )
    assert outcome == Outcome(made=12, kept=0)
    assert seen[0] == (0, 12) and seen[-1] == (12, 12) and len(seen) == 5
    assert len(fake.prompts) == 4, "a sweep is one queue entry"
    assert len(fake.uploads) == 2, "a reference is uploaded once"
    for gate in ("gate_0.00", "gate_0.50", "gate_1.00"):
        for case in benchmark_of_four.cases:
            name = f"{case.subject.name}-{case.number:02d}-0"
            assert (out / gate / "text" / f"{name}.txt").read_text() == case.prompt
            reference = case.subject.references[0]
            assert (out / gate / "src_image" / f"{name}.jpg").read_bytes() == reference.read_bytes()
            with Image.open(out / gate / "tgt_image" / f"{name}.png") as image:
                assert image.getpixel((0, 0)) == (seed_of(0, name) % 256, int(float(gate[5:]) * 50), 0)
    assert not list(out.glob("**/*.tmp"))
    head = header(out)
    assert head["gates"] == list(GATES) and head["steps"] == 30 and head["cfg"] == 7.5 and head["cases"] == 4
    assert head["files"]["CheckpointLoaderSimple (1).ckpt_name"] == {
        "name": "base.safetensors",
        "sha256": "unknown: on the server",
    }
    assert head["files"]["report clip.safetensors"]["name"] == "clip.safetensors", "the encoder that auto found"
    assert head["servers"] == [{"comfyui": "0.30.0", "pytorch": "2.8", "device": "cpu"}]


def test_files_are_hashed_where_the_models_folder_is_known(
    fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path
) -> None:
    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    (tmp_path / "models" / "checkpoints" / "base.safetensors").write_bytes(b"abc")
    generate(
        benchmark_of_four, tmp_path / "out", [fake.url], settings=FILES, on_progress=quiet, models=tmp_path / "models"
    )
    files = header(tmp_path / "out")["files"]
    assert files["CheckpointLoaderSimple (1).ckpt_name"]["sha256"].startswith("ba7816bf")
    assert files["LoadFlexIPAdapters (6).preservation"]["sha256"].startswith("unknown")
    (tmp_path / "models" / "checkpoints" / "base.safetensors").write_bytes(b"abcd")
    with pytest.raises(ValueError, match=r"holds another run \(the file base.safetensors has changed\)"):
        generate(
            benchmark_of_four,
            tmp_path / "out",
            [fake.url],
            settings=FILES,
            on_progress=quiet,
            models=tmp_path / "models",
        )


def test_again_asks_nothing_and_a_cut_picture_is_made_again(
    fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path
) -> None:
    def run() -> Outcome:
        return generate(benchmark_of_four, tmp_path / "out", [fake.url], None, GATES, settings=FILES, on_progress=quiet)

    run()
    before = fake.requests
    assert run() == Outcome(made=0, kept=12) and fake.requests == before
    victim = tmp_path / "out" / "gate_0.50" / "tgt_image" / "cat-01-0.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-20])
    assert run() == Outcome(made=3, kept=9)
    assert victim.read_bytes() == whole
    assert [prompt["2"]["inputs"]["text"] for prompt in fake.prompts[4:]] == ["a cat in snow"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {**FILES, "steps": 4}}, r"FlexIPSampler \(9\) steps: 30 there, 4 now"),
        ({"settings": {**FILES, "adapters": "b.safetensors"}}, "preservation: 'adapters.safetensors' there, 'b.saf"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"knob": "strength"}, "knob: 'gate' there, 'strength' now"),
        ({"gates": ()}, r"gates: \[0.0, 0.5, 1.0\] there, none now"),
        ({"reference": 1}, "reference: 0 there, 1 now"),
    ],
)
def test_a_folder_of_another_run_is_refused_with_what_differs(
    fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path, change: dict, words: str
) -> None:
    asked = {"gates": GATES, "settings": FILES, "on_progress": quiet}
    generate(benchmark_of_four, tmp_path / "out", [fake.url], **asked)
    before = header(tmp_path / "out")
    with pytest.raises(ValueError, match=words):
        generate(benchmark_of_four, tmp_path / "out", [fake.url], **{**asked, **change})
    assert header(tmp_path / "out") == before and len(fake.prompts) == 4


def test_another_benchmark_of_that_name_is_refused(
    fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path
) -> None:
    generate(benchmark_of_four, tmp_path / "out", [fake.url], settings=FILES, on_progress=quiet)
    first, *rest = benchmark_of_four.cases
    other = Benchmark(benchmark_of_four.name, (Case(first.subject, first.number, "another prompt"), *rest))
    with pytest.raises(ValueError, match="benchmark_sha256"):
        generate(other, tmp_path / "out", [fake.url], settings=FILES, on_progress=quiet)


def test_a_run_grows_by_gates_and_images(fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path) -> None:
    def run(gates: tuple, images: int) -> Outcome:
        return generate(
            benchmark_of_four, tmp_path / "out", [fake.url], None, gates, images, settings=FILES, on_progress=quiet
        )

    run((0.0, 1.0), 1)
    run((0.25,), 2)  # a refinement of the grid
    assert header(tmp_path / "out")["gates"] == [0.0, 0.25, 1.0] and header(tmp_path / "out")["images"] == 2
    assert len(pictures(tmp_path / "out")) == 3 * 2 * 4, "all gates have all images"


def test_gates_in_parts_have_the_same_seed(fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path) -> None:
    generate(benchmark_of_four, tmp_path / "out", [fake.url], None, GATES, settings=FILES, on_progress=quiet, at_once=2)
    inputs = [prompt["9"]["inputs"] for prompt in fake.prompts]
    assert sorted(one["gates"] for one in inputs) == ["0, 0.5"] * 4 + ["1"] * 4
    assert len({one["seed"] for one in inputs}) == 4
    assert len(pictures(tmp_path / "out")) == 12


def test_more_gates_than_a_sampler_takes_are_several_prompts(
    fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path
) -> None:
    one = Benchmark("one", benchmark_of_four.cases[:1])
    gates = [number / 100 for number in range(101)]
    assert generate(one, tmp_path / "out", [fake.url], None, gates, settings=FILES, on_progress=quiet).made == 101
    assert sorted(prompt["9"]["inputs"]["gates"].count(",") + 1 for prompt in fake.prompts) == [37, 64]


def test_strengths_are_swept_and_no_values_keep_the_workflows_gate(
    fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path
) -> None:
    common = {"settings": FILES, "on_progress": quiet}
    generate(benchmark_of_four, tmp_path / "a", [fake.url], None, (0.0, 1.5), knob="strength", **common)
    assert {(prompt["9"]["inputs"]["gates"], prompt["9"]["inputs"]["strengths"]) for prompt in fake.prompts} == {
        ("", "0, 1.5")
    }
    assert header(tmp_path / "a")["strengths"] == [0.0, 1.5] and "gates" not in header(tmp_path / "a")
    # one adapter alone: its scale would be 0.6 of the strength at the workflow's own gate
    assert {prompt["8"]["inputs"]["gate"] for prompt in fake.prompts} == {1.0} and header(tmp_path / "a")["gate"] == 1.0
    assert "gate_1.50/tgt_image/cat-00-0.png" in pictures(tmp_path / "a")
    generate(benchmark_of_four, tmp_path / "b", [fake.url], **common)
    assert pictures(tmp_path / "b")[0] == "tgt_image/cat-00-0.png"
    assert fake.prompts[-1]["9"]["inputs"]["gates"] == ""
    with pytest.raises(ValueError, match="A gate lies between 0 and 1, got 0, 1.5"):
        generate(benchmark_of_four, tmp_path / "c", [fake.url], None, (0.0, 1.5), **common)


def test_references_in_turn(fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(benchmark_of_four, out, [fake.url], images=2, settings=FILES, on_progress=quiet, reference="all")
    assert len(fake.uploads) == 4
    used = [(out / "src_image" / f"cat-{name}.jpg").read_bytes() for name in ("00-0", "00-1", "01-0", "01-1")]
    assert used[0] == used[3] != used[1] == used[2]
    with pytest.raises(ValueError, match="cat has 2 pictures, so there is no reference 7"):
        generate(benchmark_of_four, tmp_path / "b", [fake.url], settings=FILES, on_progress=quiet, reference=7)


def test_a_server_that_dies_gives_its_work_to_the_others(
    fakes: list[FakeComfy], benchmark_of_four: Benchmark, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fakes[0].dies_after = 0
    urls = ["http://127.0.0.1:9", *(fake.url for fake in fakes)]  # nobody listens at the first
    outcome = generate(benchmark_of_four, tmp_path / "out", urls, None, GATES, settings=FILES, on_progress=quiet)
    assert outcome.made == 12 and len(pictures(tmp_path / "out")) == 12
    assert len(fakes[0].prompts) > 0, "it died with work"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0].startswith("ComfyUI at http://127.0.0.1:9 does not answer")
    assert said[1].startswith(f"{fakes[0].url} gets no more work")


def test_all_dead_is_a_sentence_and_what_was_made_stays(
    fakes: list[FakeComfy], benchmark_of_four: Benchmark, tmp_path: Path
) -> None:
    fakes[0].dies_after = fakes[1].dies_after = 0

    def run() -> Outcome:
        urls = [fake.url for fake in fakes]
        return generate(benchmark_of_four, tmp_path / "out", urls, images=3, settings=FILES, on_progress=quiet)

    with pytest.raises(ServerError, match="No server is left; 0 of 12 pictures are there"):
        run()
    fakes[0].dies_after, fakes[1].dies_after = None, 3
    fakes[0].error = {
        "node_type": "KSampler",
        "exception_message": "no memory",
        "exception_type": "torch.OutOfMemoryError",
    }
    with pytest.raises(ServerError, match="(?s)No server is left.*no memory Sample fewer at once."):
        run()
    made = pictures(tmp_path / "out")
    fakes[0].error = None
    outcome = run()
    assert outcome == Outcome(12 - len(made), len(made))


def test_ctrl_c_leaves_a_folder_to_go_on_from(fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    fake.finishes = 3
    with pytest.raises(KeyboardInterrupt):
        generate(benchmark_of_four, tmp_path / "out", [fake.url], images=5, settings=FILES, on_progress=stop)
    assert len(pictures(tmp_path / "out")) == 3
    assert fake.interrupted and not fake.running, "nothing stays in the server's queue"
    fake.finishes = None
    outcome = generate(benchmark_of_four, tmp_path / "out", [fake.url], images=5, settings=FILES, on_progress=quiet)
    assert outcome == Outcome(17, 3)


def test_a_refused_prompt_is_told(fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path) -> None:
    errors = [{"message": "Value not in list", "details": "ckpt_name: 'base.safetensors' not in []"}]
    node = {"class_type": "CheckpointLoaderSimple", "errors": errors}
    fake.refusal = {"error": {"message": "Prompt outputs failed validation"}, "node_errors": {"1": node}}
    with pytest.raises(ServerError, match=r"CheckpointLoaderSimple \(1\): Value not in list: ckpt_name"):
        generate(benchmark_of_four, tmp_path / "out", [fake.url], settings=FILES, on_progress=quiet)


def test_a_workflow_that_loses_pictures_is_told(fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path) -> None:
    fake.pictures_too_few = 1
    with pytest.raises(ServerError, match="made 2 pictures where 3 were asked for"):
        generate(benchmark_of_four, tmp_path / "out", [fake.url], None, GATES, settings=FILES, on_progress=quiet)
    assert pictures(tmp_path / "out") == []


def test_the_bar_is_on_stderr(
    fake: FakeComfy, benchmark_of_four: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    generate(benchmark_of_four, tmp_path / "out", [fake.url], settings=FILES)
    said = capsys.readouterr()
    assert "4/4" in said.err and said.out == ""


def test_a_prompt_that_the_server_lost_is_told(fake: FakeComfy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "QUEUE_SECONDS", 0.05)
    with pytest.raises(ServerError, match="lost a prompt"):
        ComfyClient(fake.url).wait("stuck")


def test_waiting_ends_with_the_timeout(fake: FakeComfy) -> None:
    fake.running.append("stuck")
    with pytest.raises(TimeoutError, match="within 0 s"):
        ComfyClient(fake.url).wait("stuck", timeout=0.1)


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not the address of a server"):
        ComfyClient(url)


def test_addresses_as_people_write_them() -> None:
    assert ComfyClient(" 127.0.0.1:8188/ ").url == ComfyClient("http://127.0.0.1:8188").url == "http://127.0.0.1:8188"


def test_something_else_than_comfyui_is_told(fake: FakeComfy) -> None:
    with pytest.raises(ServerError, match="with something other than JSON; is it ComfyUI"):
        ComfyClient(fake.url).get("/nothing")


def shipped(**changes: dict | None) -> dict:
    """The shipped workflow with other nodes, or without some: node_10=None."""
    prompt = read_recipe(None, FILES, dict).prompt
    prompt["11"] = {"class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": "x"}}
    for name, node in changes.items():
        key = name.removeprefix("node_")
        prompt = {**prompt, key: node} if node else {k: v for k, v in prompt.items() if k != key}
    return prompt


SHEET = {"class_type": "SaveImage", "inputs": {"images": ["9", 1], "filename_prefix": "sheet"}}
ENCODED = {"class_type": "EncodeReference", "inputs": {"adapters": ["6", 0], "image": ["1", 4]}}
TEXT = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["1", 0]}}


@pytest.mark.parametrize(
    ("workflow", "words"),
    [
        (shipped(node_9=None), "no FlexIPSampler node"),
        (shipped(node_11=SHEET), "no SaveImage node for pictures .*the contact sheet does not count"),
        (shipped(node_12=shipped()["11"]), "2 SaveImage node"),
        (shipped(node_7=ENCODED), "no LoadImage node behind EncodeReference"),
        (shipped(node_2=TEXT), "no CLIPTextEncode node behind the FlexIPSampler's positive"),
        (shipped(node_5=None), r"EncodeReference \(7\) image is wired to node 5, which is not there"),
    ],
)
def test_what_a_workflow_lacks_is_a_sentence(workflow: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_recipe(workflow, {})


def test_what_does_not_lead_to_the_pictures_is_left_out() -> None:
    workflow = shipped(node_12=SHEET, node_13={"class_type": "PreviewAny", "inputs": {"source": ["9", 2]}})
    workflow["9"]["inputs"]["vae"] = ["1", 2]
    workflow["4"]["inputs"]["batch_size"] = 3
    recipe = make_recipe(workflow, {})
    assert not {"12", "13"} & recipe.prompt.keys() and "vae" not in recipe.prompt["9"]["inputs"]
    assert nodes_of(recipe.prompt, "SaveImage") == [], "pictures go into the folder that the server clears"
    assert recipe.prompt["4"]["inputs"]["batch_size"] == 1
    assert workflow["4"]["inputs"]["batch_size"] == 3, "the workflow itself is not changed"


def test_settings_reach_their_nodes() -> None:
    settings = {"steps": 5, "width": 64, "negative": "ugly", "EncodeReference.crop": "pad"}
    recipe = make_recipe(shipped(), settings)
    head = recipe.header()
    assert (head["steps"], head["width"], head["height"], head["negative"]) == (5, 64, 512, "ugly")
    assert recipe.prompt["7"]["inputs"]["crop"] == "pad"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"step": 5}, "there is no setting 'step'; there are steps, cfg"),
        ({"EncodeReference.corp": "pad"}, r"EncodeReference \(7\) has no input corp"),
        ({"Nothing.at_all": 1}, "no Nothing node"),
    ],
)
def test_a_setting_that_is_none_is_told(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_recipe(shipped(), settings)


def test_the_shipped_workflow_asks_for_the_files() -> None:
    with pytest.raises(ValueError, match="generate.json: give the setting checkpoint"):
        read_recipe(None, {}, dict)


def test_what_is_no_workflow_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, words in (
        ("[1]", "is not a workflow; save one"),
        ("x", "it is not JSON"),
        ('{"a": 1}', "is not a workflow; save"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_recipe(path, {}, dict)
    with pytest.raises(ValueError, match="cannot be read"):
        read_recipe(tmp_path / "none.json", {}, dict)


def test_the_partly_refused_prompt_is_taken_back(fake: FakeComfy, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {
        "prompt_id": "one",
        "node_errors": {"1": {"class_type": "A", "errors": [{"message": "m", "details": "d"}]}},
    }
    monkeypatch.setattr(fake, "_queue", lambda prompt: (200, answer))
    with pytest.raises(PromptError, match=r"A \(1\): m: d"):
        ComfyClient(fake.url).queue({})
    assert fake.interrupted == ["one"]


def quiet(done: int, total: int) -> None:
    """Instead of the bar."""
