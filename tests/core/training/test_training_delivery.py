"""Nothing trained is overwritten: by the commands, too, whatever became of a run's folder meanwhile."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple

import pytest
import torch
import training_fakes as fakes
import training_folders
from safetensors import safe_open

from flexip_core.files.checkpoint import about, load_checkpoint, save_checkpoint
from flexip_core.network.adapters import FlexIPNetwork
from flexip_core.network.config import FlexIPConfig
from flexip_core.training import background, checkpointing, delivery
from flexip_core.training.__main__ import main
from flexip_core.training.loop import FINAL
from flexip_core.training.start import make_network

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

    assert train(tmp_path, name="another") == 1 and "is not from this run" in caplog.text
    assert not (tmp_path / "another" / FINAL).exists(), "it is said before anything is trained"
    (tmp_path / MODELS).write_bytes(b"another's")
    caplog.clear()
    assert train(tmp_path, "--resume", steps=4) == 1 and "is not from this run" in caplog.text
    assert main(["export", str(tmp_path / "run"), str(tmp_path / MODELS)]) == 1
    assert (tmp_path / MODELS).read_bytes() == b"another's"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "new.safetensors")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "new.safetensors"), "--last"]) == 0, "its own again"


def old_reader(path):
    """What every version reads of a file: format, config, and the tensors that the config describes."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    assert metadata["flexip.format"] == "1"
    network = FlexIPNetwork(FlexIPConfig.from_dict(json.loads(metadata["flexip.config"])))
    network.load_state_dict(tensors, strict=True)
    return network, tensors


def test_what_leaves_the_trainer_says_where_it_comes_from_and_older_versions_read_it(tmp_path):
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"weights of a base")
    training_folders.small_set(tmp_path / "pets")
    task = {"make": "training_fakes:task_of_files", "checkpoint": str(base), "data": str(tmp_path / "pets")}
    assert train(tmp_path, half=True, license="CC-BY-4.0", task=task) == 0
    network, tensors = old_reader(tmp_path / MODELS)
    whole = load_checkpoint(tmp_path / "run" / FINAL)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    for key, value in whole.state_dict().items():
        assert torch.equal(tensors[key], value.half())
    assert (tmp_path / MODELS).stat().st_size < 0.6 * (tmp_path / "run" / FINAL).stat().st_size
    known = about(tmp_path / MODELS)
    assert (
        known["steps"] == 2 and known["license"] == "CC-BY-4.0" and known["settings"]["gates"]["variant"] == [0.0, 0.5]
    )
    assert known["files"] == {
        "checkpoint": {"name": "base.safetensors", "sha256": hashlib.sha256(b"weights of a base").hexdigest()}
    }
    assert (known["data"]["subjects"], known["data"]["loose pictures"]) == (2, 3)
    assert str(tmp_path) not in json.dumps(known), "paths of somebody's disk"
    card = (tmp_path / "models.md").read_text()
    assert all(text in card for text in ("CC-BY-4.0", known["files"]["checkpoint"]["sha256"], "float16", "0.5 to 1"))
    (tmp_path / "models.md").write_text("mine")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / MODELS)]) == 0
    assert (tmp_path / "models.md").read_text() == "mine"


def test_numbers_that_half_precision_cannot_hold_are_refused(tmp_path):
    network = make_network(fakes.config(tmp_path), fakes.FakeBase())
    with torch.no_grad():
        network.preservation.queries[0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="preservation.queries has values that torch.float16 cannot hold"):
        save_checkpoint(network, tmp_path / "x.safetensors", torch.float16)
    assert not (tmp_path / "x.safetensors").exists()
    save_checkpoint(network, tmp_path / "x.safetensors")
    assert about(tmp_path / "x.safetensors") == {}


def test_without_its_states_a_folder_with_adapters_takes_no_other_settings(tmp_path, caplog):
    assert train(tmp_path) == 0
    for state in checkpointing.states(tmp_path / "run"):
        state.unlink()
    final = (tmp_path / "run" / FINAL).read_bytes()
    for changes, sentence in (({"seed": 99}, "other settings (seed"), ({"steps": 5}, "no state to go on from")):
        caplog.clear()
        assert train(tmp_path, "--resume", **changes) == 1 and sentence in caplog.text
    (tmp_path / "run" / background.CONFIG).unlink()
    assert train(tmp_path) == 1 and "nothing says which settings" in caplog.text
    assert (tmp_path / "run" / FINAL).read_bytes() == final


def test_a_file_that_comes_while_a_run_trains_stays(tmp_path):
    cfg, mine = fakes.config(tmp_path), tmp_path / "mine.safetensors"
    save_checkpoint(make_network(cfg, fakes.FakeBase()), mine, about={"steps": 1, "weights": "average"})
    (tmp_path / MODELS).write_bytes(b"another's")
    with pytest.raises(ValueError, match="is not from this run"):
        delivery.deliver(tmp_path, mine, tmp_path / MODELS, cfg)
    assert (tmp_path / MODELS).read_bytes() == b"another's"
    delivery.deliver(tmp_path, mine, tmp_path / "free", cfg)
    (tmp_path / delivery.DELIVERED).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not from this run"):  # who cannot tell writes over nothing
        delivery.deliver(tmp_path, mine, tmp_path / "free", cfg)


def test_a_disk_without_room_for_the_states_is_a_sentence_before_the_first_step(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    assert train(tmp_path) == 1 and "0.0 GB left, and a state takes" in caplog.text
    assert not checkpointing.states(tmp_path / "run") and not (tmp_path / "run" / "log.jsonl").exists()


def test_a_disk_that_fills_meanwhile_keeps_the_states_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1999))
    checkpointing.check_room(tmp_path, 999)
    with pytest.raises(RuntimeError, match="the states before it are kept. Make room, or lower keep"):
        checkpointing.check_room(tmp_path, 1000)
