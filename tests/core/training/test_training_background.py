"""A run in a process of its own: started, watched, stopped, gone on with, and never two in one folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import training_fakes as fakes

from flexip_core.files.weights import read_tensors
from flexip_core.training import background
from flexip_core.training.__main__ import main
from flexip_core.training.ranks import TrainingError

TASK = {"make": "training_fakes:task"}
start = functools.partial(background.start, allow_code=True)  # of the tests


def config(folder, **changes):
    """Small, and a log line and a state after each step."""
    often = {"log_every": 1, "probe_every": 2, "checkpoint_every": 1}
    return fakes.config(folder, **{**often, "task": TASK, **changes})


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The fake task can be imported by the process that is started."""
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return result


def ended(folder):
    """The run's status once nobody trains it."""
    wait_for(lambda: not background.is_running(folder))
    return background.status(folder)


@pytest.mark.long  # tests/comfy/test_training_example.py does the same through the nodes
def test_a_run_is_stopped_and_gone_on_with_to_the_same_weights(tmp_path):
    """One process is stopped by request, the next goes on; the adapters equal those of a run that nobody stopped."""
    whole = config(tmp_path / "elsewhere" / "whole", steps=40)  # beside each other one would have to wait for the other
    start(whole, tmp_path / "models" / "whole.safetensors")
    cfg = config(tmp_path / "stopped", steps=40)
    start(cfg, tmp_path / "models" / "stopped.safetensors")
    folder = tmp_path / "stopped"
    assert background.status(folder).state in ("starting", "running")
    with pytest.raises(ValueError, match="already being trained"):
        start(cfg)
    with pytest.raises(ValueError, match="The run stopped is being trained on cpu"):
        start(config(tmp_path / "another"))
    with pytest.raises(TrainingError, match="Another process is training"), background.locked(wait_for_lock(folder)):
        pass
    wait_for(lambda: background.status(folder).step >= 2)
    background.ask_to_stop(folder)
    stopped = ended(folder)
    assert stopped.state == "stopped" and 2 <= stopped.step < 40 and "go on" in stopped.text()
    assert not (tmp_path / "models" / "stopped.safetensors").exists()
    start(cfg, tmp_path / "models" / "stopped.safetensors")
    done = ended(folder)
    assert done.state == "finished" and done.step == 40 and [line["step"] for line in done.losses] == list(range(1, 41))
    assert ended(tmp_path / "elsewhere" / "whole").state == "finished"
    one, other = (read_tensors(tmp_path / "models" / f"{name}.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def wait_for_lock(folder):
    wait_for(lambda: background._is_locked(folder))
    return folder


def test_the_process_outlives_signals_to_its_starter_and_its_end_is_told(tmp_path):
    """It is in a session of its own; killed, the next start goes on, and the lock is free."""
    start(config(tmp_path / "run", steps=100_000))
    folder = tmp_path / "run"
    pid = json.loads((folder / background.PROCESS).read_text())["pid"]
    assert os.getsid(pid) != os.getsid(0)
    wait_for(lambda: background.status(folder).step >= 1)
    os.kill(pid, signal.SIGKILL)
    found = ended(folder)
    assert found.state == "failed" and "continues from its last state" in found.why
    with background.locked(folder):
        pass


def test_an_error_of_the_run_is_shown_as_it_was_said(tmp_path):
    start(config(tmp_path / "run", task={"make": "training_fakes:nothing"}))
    found = ended(tmp_path / "run")
    assert found.state == "failed" and "does not name a function" in found.why and found.why in found.text()


def test_other_settings_are_refused_and_more_steps_are_not(tmp_path):
    cfg = config(tmp_path / "run", steps=5)
    assert background.changed_settings(cfg, dataclasses.replace(cfg, steps=9, device="cuda")) == ""
    assert background.changed_settings(cfg, dataclasses.replace(cfg, steps=4)) == "steps: 5 there, 4 now"
    turned = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, lr=0.5))
    assert background.changed_settings(cfg, turned) == ""
    assert background.changed_settings(cfg, turned, every=True) == f"optimizer.lr: {cfg.optimizer.lr} there, 0.5 now"
    other = dataclasses.replace(cfg, seed=8)
    assert background.changed_settings(cfg, other) == f"seed: {cfg.seed} there, 8 now"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / background.CONFIG).write_text(json.dumps(cfg.to_dict()))
    (tmp_path / "run" / "state_00000001.safetensors").touch()
    with pytest.raises(ValueError, match="begun with other settings .*seed"):
        start(other)


FILES = ("checkpoint", "clip_vision", "dino", "data")


def task_in(folder, **changes):
    """As the node writes it; of the files only those are there that a test puts there."""
    return {"make": "x:y", **{name: str(folder / f"the {name}") for name in FILES}, "size": 64, **changes}


@pytest.mark.parametrize(
    "name, value", [*((name, "/models/another") for name in FILES), ("size", 512), ("make", "x:z")]
)
def test_another_base_encoder_data_or_size_is_another_run(tmp_path, name, value):
    one, other = (config(tmp_path, task=task_in(tmp_path, **changes)) for changes in ({}, {name: value}))
    assert background.changed_settings(one, other) == f"task.{name}: {one.task[name]} there, {value} now"


def test_the_same_files_elsewhere_more_pictures_and_another_preview_are_the_same_run(tmp_path):
    """A run may move with its models to another disk or computer, and a cache may be filled for it meanwhile."""
    for folder in ("old", "new"):
        (tmp_path / folder / "the data").mkdir(parents=True)
        (tmp_path / folder / "the dino").write_bytes(b"weights")
    (tmp_path / "new" / "the data" / "more.png").touch()
    more = {"cache": "cache", "probe_cases": 2, "probe_steps": 4, "checkpoint": "D:\\models\\the checkpoint"}
    old, new = (task_in(tmp_path / folder, **changes) for folder, changes in (("old", {}), ("new", more)))
    assert background.changed_settings(config(tmp_path, task=old), config(tmp_path, task=new)) == ""


def test_another_file_of_the_same_name_is_another_encoder(tmp_path):
    """Many files on Hugging Face are called model.safetensors."""
    for folder in ("vit-h", "vit-l"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(folder.encode())
    one, other = (
        config(tmp_path, task=task_in(tmp_path, dino=str(tmp_path / folder / "model.safetensors")))
        for folder in ("vit-h", "vit-l")
    )
    assert background.changed_settings(one, other).startswith("task.dino: ")


def test_a_run_that_fails_before_it_begins_leaves_no_folder(tmp_path, caplog):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(tmp_path / "runs" / "mine", task={"make": "nowhere:task"}).to_dict()))
    assert main(["run", str(path), "--allow-code"]) == 1 and "does not name a function" in caplog.text
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "runs" / "other").mkdir(parents=True)
    assert main(["run", str(path), "--allow-code"]) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"], "what was there before stays"


def test_a_process_number_that_the_system_gave_to_somebody_else_is_not_the_run(tmp_path):
    about = {"pid": os.getpid(), "created": psutil.Process().create_time() - 100}
    (tmp_path / background.PROCESS).write_text(json.dumps(about))
    assert not background.is_running(tmp_path)


def test_nothing_to_look_at_or_to_stop_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no training run 'x'"):
        background.status(tmp_path / "x")
    with pytest.raises(ValueError, match="nothing to stop"):
        background.ask_to_stop(tmp_path / "x")


DEEP = "[" * 100_000 + "]" * 100_000
HUGE = f'{{"step": {"9" * 4000}}}'
LOG_LINE = {"step": 1, "loss": 0.5, "seconds": 1.0, "loss_by_kind": {"variant": 0.5, "invariant": None}}


@pytest.mark.parametrize("text", ["{", "[1]", "1", "null", DEEP, HUGE, '{"steps": {}}', "\ud800"])
def test_a_damaged_config_is_a_sentence(tmp_path, text):
    (tmp_path / background.CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="config.json is damaged"):
        background.status(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        *("{}", "[1]", "1", "null", DEEP, HUGE, "{", '{"step": "1"}', '{"step": true}', '{"step": 1, "loss": "low"}'),
        json.dumps(LOG_LINE | {"loss_by_kind": [1]}),
        json.dumps(LOG_LINE | {"loss_by_kind": {"variant": "x"}}),
        json.dumps(LOG_LINE | {"seconds": None}),
        '{"step": 1, "probe": [1]}',
        '{"step": 1, "probe": {"score": "high"}, "best": true}',
        '{"step": 1, "probe": {"score": 1.0}}',
    ],
)
def test_a_damaged_log_is_a_sentence(tmp_path, line):
    (tmp_path / background.CONFIG).write_text(json.dumps(config(tmp_path).to_dict()))
    (tmp_path / "log.jsonl").write_text(json.dumps(LOG_LINE) + "\n")
    assert background.status(tmp_path).step == 1
    (tmp_path / "log.jsonl").write_text(json.dumps(LOG_LINE) + f"\n{line}\n")
    with pytest.raises(ValueError, match="line 2 of .*log.jsonl is damaged"):
        background.status(tmp_path)


@pytest.mark.parametrize(
    "text", ["[1]", "1", "null", DEEP, '{"pid": "1", "created": 0}', '{"pid": -1, "created": 0}', '{"pid": 1e400}']
)
def test_a_damaged_note_of_the_process_is_no_process(tmp_path, text):
    (tmp_path / background.PROCESS).write_text(text)
    assert not background.is_running(tmp_path)


@pytest.mark.parametrize("name", ["output.log", "log.jsonl", "previews", "state_00000001.safetensors"])
def test_no_run_starts_through_a_link(tmp_path, monkeypatch, name):
    """A run's folder from elsewhere need not have the config that would tell: what the process says would go over another file."""
    monkeypatch.setattr(background.subprocess, "Popen", lambda *a, **k: pytest.fail("started"))
    folder, secret = tmp_path / "run", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("secret")
    (folder / name).symlink_to(secret)
    cfg = config(folder)
    with pytest.raises(ValueError, match=f"{name} is a link"):
        start(cfg)
    with pytest.raises(ValueError, match=f"{name} is a link"), background.locked(folder):
        pass
    assert secret.read_text() == "secret" and [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize("name", [background.LOCK, background.PROCESS])
def test_a_folder_or_a_pipe_in_a_run_beside_it_is_in_nobodys_way(tmp_path, name):
    other = tmp_path / "other"
    other.mkdir()
    (other / background.CONFIG).write_text(json.dumps(config(other).to_dict()))
    for make in (os.mkdir, getattr(os, "mkfifo", os.mkdir)):
        make(other / name)
        assert not background.is_running(other)
        background.refuse(config(tmp_path / "run"))
        (other / name).rmdir() if (other / name).is_dir() else (other / name).unlink()


def test_a_log_that_no_run_writes_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / background.CONFIG).write_text(json.dumps(config(tmp_path).to_dict()))
    (tmp_path / background.LOG).write_text(json.dumps(LOG_LINE) + "\n")
    monkeypatch.setattr(background, "LONGEST_LOG", 20)
    with pytest.raises(ValueError, match="log.jsonl is longer than 20 bytes"):
        background.status(tmp_path)


def test_of_what_the_process_said_only_the_end_is_read(tmp_path):
    (tmp_path / background.CONFIG).write_text(json.dumps(config(tmp_path).to_dict()))
    with (tmp_path / background.OUTPUT).open("wb") as file:
        file.seek(2**33)
        file.write(b"\nIt failed.\n")
    assert background.status(tmp_path).why == "It failed."


def test_a_settings_file_of_a_program_is_read_as_toml_is(tmp_path, caplog):
    (tmp_path / "config.json").write_text("{")
    assert main(["run", str(tmp_path / "config.json")]) == 1 and "not a JSON file" in caplog.text
    (tmp_path / "task.json").write_text(json.dumps(config(tmp_path / "r", task={**TASK, "colour": 1}).to_dict()))
    assert main(["run", str(tmp_path / "task.json"), "--allow-code"]) == 1
    assert "[task] does not fit training_fakes:task" in caplog.text and "colour" in caplog.text
