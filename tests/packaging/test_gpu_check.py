"""scripts/gpu_check.py on the CPU with tiny models, so that it works on the day when a GPU is there."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "scripts"))
import gpu_check

SMALL = ["--device", "cpu", "--small"]


def lines_of(capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    return {line["check"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}


def test_parts_fit_into_the_time_that_is_lent() -> None:
    for part in (1, 2):
        assert sum(check.limit for check in gpu_check.CHECKS if check.part == part) <= 360


def test_a_check_that_fails_says_why_and_the_next_one_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """comfyui fails without a tree; a limit of no time at all stops the other."""
    arguments = [*SMALL, "--only", "machine", "comfyui", "--out", str(tmp_path)]
    assert gpu_check.main([*arguments, "--scale", "10"]) == 1
    found = lines_of(capsys)
    assert found["machine"]["passed"] and found["machine"]["packages"]["torch"]
    assert not found["comfyui"]["passed"] and "--comfyui" in found["comfyui"]["reason"]
    assert [json.loads(line)["check"] for line in (tmp_path / "checks.jsonl").open()] == ["machine", "comfyui"]


def test_a_check_that_hangs_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([*SMALL, "--only", "step", "--out", str(tmp_path), "--scale", "0"]) == 1
    assert lines_of(capsys)["step"]["reason"] == "It took longer than 0 s."


@pytest.mark.long
def test_every_check_passes_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = os.environ["COMFYUI_TREE"]
    gpu_check.main([*SMALL, "--comfyui", tree, "--out", str(tmp_path), "--scale", "20"])
    found = lines_of(capsys)
    assert list(found) == [check.name for check in gpu_check.CHECKS]
    assert {name: line.get("reason", line) for name, line in found.items() if not line["passed"]} == {}


def test_a_difference_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of a step sees a device that computes otherwise."""
    monkeypatch.syspath_prepend(str(REPO / "tests" / "fixtures"))
    from gpu_checks import training

    honest = training._gradients

    def wrong(folder: Path, device: str, mode: str, **changes: object) -> dict[str, float]:
        found = honest(folder, device, mode, **changes)
        return found if not changes else {**found, "loss": found["loss"] * 1.05}

    monkeypatch.setattr(training, "_gradients", wrong)
    assert not training.step(types.SimpleNamespace(out=tmp_path, device="cpu"))["passed"]
    monkeypatch.setattr(training, "_gradients", honest)
    assert training.step(types.SimpleNamespace(out=tmp_path, device="cpu"))["passed"]
