"""The worked example: photographs -> check -> cache -> train -> stop -> resume -> export -> the nodes that draw with it. Tiny models.

Once by the commands, once by the training nodes; both end in the same adapters.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import folder_paths
import pytest
import tiny
import torch
from flexip_pack.flexip_core.training import background
from flexip_pack.flexip_core.untrained import mini, mini_checkpoints
from flexip_pack.nodes import files
from flexip_pack.nodes.apply import ApplyFlexIPGate
from flexip_pack.nodes.encode import EncodeReference
from flexip_pack.nodes.load import LoadFlexIPAdapters
from flexip_pack.nodes.train import RUNS, FlexIPTrain
from flexip_pack.nodes.training_status import FlexIPTrainingStatus
from PIL import Image
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
SIZE, STEPS = 64, 8
SETTINGS = """
log_every = 1
probe_every = 4
checkpoint_every = 100
dropout = {{ phrase = 0.2 }}

[network]
detail_tokens = 3
semantic_tokens = 2
cls_tokens = 2
resampler = {{ width = 64, depth = 1, heads = 2, dim_head = 32, ff_mult = 2 }}

[optimizer]
warmup = 0
{lr}
[task]
cache = {cache}
probe_cases = 2
probe_steps = 1
{task}
"""
WHOLE = """
steps = {steps}
batch = 2
seed = 5
folder = {folder}
precision = "fp32"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Example data in input/, tiny models in models/, and what the commands made of them."""
    root = tmp_path_factory.mktemp("example")
    models, data = root / "models", root / "input" / "photographs"
    data.parent.mkdir()
    checkpoint = models / "checkpoints" / "base.ckpt"
    mini_checkpoints.make_base(checkpoint, "sd15_min", text_layers=(2, 2))
    mini.make_mini_encoders(models / files.ENCODER_FOLDER)
    encoders = [models / files.ENCODER_FOLDER / name for name in (mini.MINI_CLIP_FILE, mini.MINI_DINO_FILE)]
    run([REPO / "scripts" / "example_data.py", data])

    task = {"make": "flexip_core.training.sd:make", "data": data, "checkpoint": checkpoint}
    task |= dict(zip(("clip_vision", "dino"), encoders))
    cache = quoted(root / "input" / "cache")
    lines = "\n".join(f"{name} = {quoted(value)}" for name, value in task.items())
    for name in ("stopped", "whole"):
        begin = WHOLE.format(steps=STEPS, folder=quoted(root / name))
        rest = SETTINGS.format(lr="lr = 1e-3", cache=cache, task=f"{lines}\nsize = {SIZE}")
        (root / f"{name}.toml").write_text(begin + rest)
    (root / "stopped").mkdir()
    (root / "stopped" / background.STOP).touch()
    flexip = models / "flexip"
    said = run_commands(
        ["check", data, "--size", str(SIZE), "--sheet", root / "pairs.png"],
        ["cache", root / "stopped.toml", "--patches"],
        ["run", root / "stopped.toml"],
        ["run", root / "stopped.toml", "--resume", "--export", flexip / "resumed.safetensors"],
        ["export", root / "stopped", flexip / "exported.safetensors"],
        ["run", root / "whole.toml", "--export", flexip / "whole.safetensors"],
    )
    settings = SETTINGS.format(lr="", cache=quoted("cache"), task="")
    return SimpleNamespace(
        root=root, models=models, data=data, flexip=flexip, checkpoint=checkpoint, said=said, settings=settings
    )


def quoted(value: object) -> str:
    return json.dumps(str(value))


def run(command: list) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        check=False,
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_commands(*commands: list) -> dict[str, str]:
    """What each command said, by its name; the second of a name has a + behind it."""
    text = run([REPO / "tests/fixtures/training_commands.py", json.dumps([list(map(str, c)) for c in commands])])
    said: dict[str, str] = {}
    for part in text.split("$ ")[1:]:
        name = part.split()[0]
        while name in said:
            name += "+"
        said[name] = part
    return said


@pytest.fixture
def comfyui(made, monkeypatch):
    """ComfyUI's folders are those of the example."""
    table = dict(folder_paths.folder_names_and_paths)
    for name, endings in (("checkpoints", {".ckpt"}), ("flexip", {".safetensors"}), ("ipadapter", {".safetensors"})):
        (made.models / name).mkdir(exist_ok=True)
        table[name] = ([str(made.models / name)], endings)
    table[files.ENCODER_FOLDER] = ([str(made.models / files.ENCODER_FOLDER)], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "input_directory", str(made.root / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(made.root / "output"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return made


@pytest.fixture(scope="module")
def base(made):
    layers = {"clip_l_model_config": {"num_hidden_layers": 2}}
    return comfy.sd.load_checkpoint_guess_config(str(made.checkpoint), te_model_options=layers)[:3]


def drawn(base, name: str, gate: float, picture: Path) -> torch.Tensor:
    """(1, h, w, 3) through the nodes, two steps."""
    model, clip, vae = base
    adapters = LoadFlexIPAdapters.execute(name, "auto", "auto", "auto").args[0]
    pixels = tiny_picture(picture)
    reference = EncodeReference.execute([adapters], [pixels], ["center"]).args[0]
    assert mini.MINI_CLIP_FILE in reference.encoders and mini.MINI_DINO_FILE in reference.encoders
    gated = ApplyFlexIPGate.execute(model, adapters, reference, gate, 1.0, 0.0, 1.0).args[0]
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("an orange dahlia", ""))
    return vae.decode(tiny.ksample(gated, positive, negative, steps=2, noise=tiny.noise_for(1, SIZE // 8, SIZE // 8)))


def tiny_picture(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return (
            torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(1, *image.size[::-1], 3)
            / 255
        )


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_commands_say_what_they_found_and_did(made):
    assert "5 subjects with 15 views" in made.said["check"] and "Nothing is wrong." in made.said["check"]
    sheet = Image.open(made.root / "pairs.png")
    assert sheet.width > 1000 and len(sheet.getcolors(2**24)) > 10_000, "photographs"
    assert "entries already there" in made.said["cache"]
    assert "Stopped after step 1;" in made.said["run"]
    assert "Resumed at step 1." in made.said["run+"]
    for name in ("stopped", "whole"):
        previews = sorted(path.name for path in (made.root / name / "previews").iterdir())
        assert previews == ["step_000004.png", "step_000008.png"]
        steps = [json.loads(line) for line in (made.root / name / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == list(range(1, STEPS + 1))


def test_a_run_that_was_stopped_ends_in_the_adapters_of_one_that_was_not(made):
    assert same(made.flexip / "resumed.safetensors", made.flexip / "whole.safetensors")
    assert same(made.flexip / "exported.safetensors", made.root / "whole" / "final.safetensors")


def test_the_exported_adapters_draw_in_comfyui_and_the_gate_acts(comfyui, base):
    reference = comfyui.data / "val/variant/flower/1.jpg"
    names = ("exported.safetensors", "resumed.safetensors", "whole.safetensors")
    pictures = {gate: drawn(base, names[0], gate, reference) for gate in (0.0, 1.0)}
    for picture in pictures.values():
        assert picture.shape == (1, SIZE, SIZE, 3) and picture.isfinite().all() and picture.std() > 0.01
    assert (pictures[0.0] - pictures[1.0]).abs().max() > 0.01
    assert torch.equal(*(drawn(base, name, 0.7, reference) for name in names[1:]))


def wait_for(condition, seconds: float = 240):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return result


def train(comfyui, **changes):
    inputs = {
        "run": "photographs",
        "checkpoint": "base.ckpt",
        "clip_vision": mini.MINI_CLIP_FILE,
        "dino": mini.MINI_DINO_FILE,
        "data": "photographs",
        "steps": STEPS,
        "batch": 2,
        "size": SIZE,
        "learning_rate": 1e-3,
        "seed": 5,
        "precision": "fp32",
        "recompute": False,
        "settings": comfyui.settings,
    }
    with torch.inference_mode():  # as ComfyUI calls it
        return FlexIPTrain.execute(**{**inputs, **changes}).args


def look(action: str = "look"):
    with torch.inference_mode():
        return FlexIPTrainingStatus.execute("photographs", action).args


def test_the_training_nodes_end_in_the_adapters_of_the_commands(comfyui):
    """Started, looked at, stopped, gone on with, finished, in real processes of their own."""
    folder, adapters = comfyui.root / "output" / RUNS / "photographs", comfyui.flexip / "photographs.safetensors"
    name, report = train(comfyui)
    assert name == "photographs" and "has begun" in report and "5 subjects" in report
    report, losses, preview = look()
    assert ": starting at" in report or ": running at" in report
    assert preview.std() == 0, "grey before the first one"
    assert "is being trained" in train(comfyui)[1], "queued twice: nothing is started, nothing fails"
    with pytest.raises(ValueError, match="FlexIPTrain: .*is already being trained"):
        train(comfyui, batch=4)
    wait_for(lambda: background.status(folder).step >= 1 or not background.is_running(folder))
    assert "queue this node once more" in look("stop")[0] and "asked to stop" in look("stop")[0]
    wait_for(lambda: not background.is_running(folder))
    report = look()[0]
    assert ": stopped at" in report and not adapters.exists(), report
    assert "has begun" in train(comfyui)[1]
    wait_for(lambda: not background.is_running(folder))
    report, losses, preview = look()
    assert f": finished at step {STEPS} of {STEPS}." in report and "Probe at step 8" in report
    assert losses.std() > 0.01 and preview.shape[2] > preview.shape[1] > 2 * 192 and preview.std() > 0.05
    assert "is finished" in train(comfyui)[1]
    assert same(adapters, comfyui.flexip / "whole.safetensors")
