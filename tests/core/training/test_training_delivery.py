"""Nothing trained is overwritten: by the commands, too, whatever became of a run's folder meanwhile."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import training_fakes as fakes

from flexip_core.training import background, checkpointing, delivery
from flexip_core.training.__main__ import main
from flexip_core.training.loop import FINAL

MODELS = "models.safetensors"


def train(root, *more: str, name: str = "run", **changes) -> int:
    settings = {"steps": 2, "checkpoint_every": 1, "task": {"make": "training_fakes:task"}, **changes}
    (root / "config.json").write_text(json.dumps(fakes.config(root / name, **settings).to_dict()))
    return main(["run", str(root / "config.json"), "--allow-code", "--export", str(root / MODELS), *more])


def test_a_run_may_write_again_what_it_wrote_and_nothing_else(tmp_path, caplog):
    assert train(tmp_path) == 0
    adapters = (tmp_path / MODELS).read_bytes()
    assert train(tmp_path, "--resume", steps=3) == 0
    assert (tmp_path / MODELS).read_bytes() != adapters, "its own adapters, trained further"

    assert train(tmp_path, name="another") == 1 and "is not of this run" in caplog.text
    assert not (tmp_path / "another" / FINAL).exists(), "it is said before anything is trained"
    (tmp_path / MODELS).write_bytes(b"another's")
    caplog.clear()
    assert train(tmp_path, "--resume", steps=4) == 1 and "is not of this run" in caplog.text
    assert main(["export", str(tmp_path / "run"), str(tmp_path / MODELS)]) == 1
    assert (tmp_path / MODELS).read_bytes() == b"another's"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "new.safetensors")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "new.safetensors"), "--last"]) == 0, "its own again"


def test_without_its_states_a_folder_with_adapters_takes_no_other_settings(tmp_path, caplog):
    assert train(tmp_path) == 0
    for state in checkpointing.states(tmp_path / "run"):
        state.unlink()
    final = (tmp_path / "run" / FINAL).read_bytes()
    for changes, sentence in (({"seed": 99}, "other settings (seed"), ({"steps": 5}, "no state to go on from")):
        caplog.clear()
        assert train(tmp_path, "--resume", **changes) == 1 and sentence in caplog.text
    (tmp_path / "run" / background.CONFIG).unlink()
    assert train(tmp_path) == 1 and "nothing says with which settings" in caplog.text
    assert (tmp_path / "run" / FINAL).read_bytes() == final


def test_a_file_that_comes_while_a_run_trains_stays(tmp_path):
    (tmp_path / MODELS).write_bytes(b"another's")
    with pytest.raises(ValueError, match="is not of this run"):
        delivery.deliver(tmp_path, b"mine", tmp_path / MODELS)
    assert (tmp_path / MODELS).read_bytes() == b"another's"
    delivery.deliver(tmp_path, b"mine", tmp_path / "free")
    (tmp_path / delivery.DELIVERED).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not of this run"):  # who cannot tell writes over nothing
        delivery.deliver(tmp_path, b"more", tmp_path / "free")


def test_a_disk_without_room_for_the_states_is_a_sentence_before_the_first_step(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    assert train(tmp_path) == 1 and "0.0 GB left, and a state takes" in caplog.text
    assert not checkpointing.states(tmp_path / "run") and not (tmp_path / "run" / "log.jsonl").exists()


def test_a_disk_that_fills_meanwhile_keeps_the_states_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1999))
    checkpointing.check_room(tmp_path, 999)
    with pytest.raises(RuntimeError, match="the states before it are kept. Make room, or lower keep"):
        checkpointing.check_room(tmp_path, 1000)
