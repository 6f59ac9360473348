"""The example that docs/training.md works through: its photographs, and its config for real training."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from flexip_core.training import checkpointing, sd
from flexip_core.training.check import check
from flexip_core.training.config import TrainConfig, parse_toml, read_config
from flexip_core.training.dataset import phrases_of, scan
from flexip_core.training.sources import make_source

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO / "scripts"))
import example_data

CONFIG = REPO / "flexip_core" / "training" / "example.toml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    target = tmp_path_factory.mktemp("example") / "photographs"
    assert example_data.main([str(target)]) == 0
    return target


# --- photographs


def test_nothing_is_wrong_with_it_and_it_has_all_that_a_folder_may_have(data):
    report = check(data, example_data.SIZE)
    assert report.problems == [], report.text()
    counts = report.counts
    assert counts["subjects"] == 5 and counts["variant views"] == 15 and counts["loose pictures"] == 5
    assert counts["masks"] == 4 and counts["captions"] == 19 and counts["class captions"] == 1
    assert counts["val subjects"] == counts["val loose pictures"] == 1
    for part in ("train", "val"):
        found = scan(data, part)
        captions = [found.caption(view) for _, view in found.views()]
        assert all(captions) and sum(len(phrases_of(caption)) > 1 for caption in captions) >= len(captions) - 1


def test_both_kinds_of_pairs_come_out_of_it(data):
    source = make_source(data, 64)
    batch = source.batch(torch.tensor([0, 1] * 8), torch.Generator().manual_seed(0))
    assert batch.targets.shape == (16, 3, 64, 64) and batch.targets.std() > 0.3
    apart = (batch.targets - batch.references).abs().mean((1, 2, 3))
    assert apart[1::2].min() > 0.05, "two views of one subject are two pictures"


def test_it_is_the_same_every_time(data, tmp_path):
    example_data.write(tmp_path / "again")
    assert contents(data) == contents(tmp_path / "again")


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_photograph_is_credited(data):
    used = {folder.rpartition("/")[2] for folder in (*example_data.SUBJECTS, example_data.MOTORCYCLE[0])}
    used |= {source for source, _ in example_data.LOOSE.values()}
    assert used == set(example_data.CREDITS)
    text = (data / "CREDITS.txt").read_text()
    for what, who, licence, source in example_data.CREDITS.values():
        assert f"{what}, by {who}, {licence}, {source}" in text


def test_masks_show_the_subject_and_not_its_ground(data):
    mask = Image.open(data / "variant/motorcycle/1.mask.png")
    width, height = mask.size
    seen = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(height, width) > 127
    assert 0.1 < seen.float().mean() < 0.35
    assert not seen[:, : width // 10].any() and not seen[-height // 12 :].any(), "the floor is as near as the wheels"
    assert seen[height // 2, width // 2]


def test_a_folder_that_is_there_is_left_alone(data, tmp_path, capsys):
    before = contents(data)
    assert example_data.main([str(data)]) == 1 and "there already" in capsys.readouterr().err
    assert contents(data) == before
    (tmp_path / "empty").mkdir()
    assert example_data.write(tmp_path / "empty", 64) == 23
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_missing_package_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert example_data.main([str(tmp_path / "x")]) == 1
    assert "pip install scikit-image scikit-learn" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_shot_that_leaves_its_photograph_is_refused():
    with pytest.raises(ValueError, match="leaves its photograph"):
        example_data.square(Image.new("RGB", (100, 100)), example_data.Shot(50, 50, 90, turn=20), 32)


# --- config


def test_the_example_config_is_read_strictly_and_fits_the_task():
    cfg = read_config(CONFIG)
    options = dict(cfg.task)
    assert options.pop("make") == f"{sd.__name__}:{sd.make.__name__}"
    inspect.signature(sd.make).bind(device=cfg.device, run=cfg, **options)


def test_the_example_config_names_every_setting_and_tells_every_default():
    text = CONFIG.read_text(encoding="utf-8")
    shown = checkpointing._flat(parse_toml(text, CONFIG.name))
    known = checkpointing._flat(TrainConfig(1, 1, 0, "").to_dict())
    required = {
        f.name for f in dataclasses.fields(TrainConfig) if f.default is f.default_factory is dataclasses.MISSING
    }
    task = {name for name in shown if name.startswith("task.")}
    assert shown.keys() - task == known.keys() - {"task"}
    parameters = {f"task.{name}" for name in inspect.signature(sd.make).parameters} - {"task.device", "task.run"}
    # a checkpoint says its prediction itself; TOML has no word for none
    assert task == (parameters - {"task.options", "task.prediction"}) | {"task.make"}
    told = dict(re.findall(r"^(\w+) *=.*# .*default: (\S+?)[,;.]?(?: .*)?$", text, re.MULTILINE))
    for name in shown.keys() - task - required:
        short = name.rpartition(".")[2]
        expected = parse_toml(f"x = {told[short]}", name)["x"] if short in told else shown[name]
        same = known[name] == expected or known[name] == [expected, expected]
        assert same, f"{name} is {known[name]} by default"
