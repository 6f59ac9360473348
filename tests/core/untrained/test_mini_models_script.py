"""scripts/mini_models.py: what a user without files runs for the workflows that name the mini models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flexip_core.untrained import mini

REPO = Path(__file__).resolve().parents[3]
SCRIPT = REPO / "scripts" / "mini_models.py"
FILES = {
    f"checkpoints/{mini.MINI_BASE}",
    f"flexip/{mini.MINI_FLEXIP}",
    f"clip_vision/{mini.MINI_CLIP_FILE}",
    f"clip_vision/{mini.MINI_DINO_FILE}",
}
sys.path.insert(0, str(SCRIPT.parent))
from mini_models import write_mini_models


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """As a fresh ComfyUI has it: no folder flexip."""
    for folder in ("checkpoints", "clip_vision"):
        (tmp_path / "models" / folder).mkdir(parents=True)
    return tmp_path / "models"


def files(models: Path) -> set[str]:
    return {path.relative_to(models).as_posix() for path in models.rglob("*") if path.is_file()}


def test_the_command_writes_what_the_workflows_name_and_says_that_it_is_untrained(models: Path) -> None:
    # from another folder and without the current one on the path, as Windows' portable build runs it
    done = subprocess.run(
        [sys.executable, "-I", str(SCRIPT), str(models)],
        cwd=models,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert files(models) == FILES
    assert [name for name in FILES if str(models / name) not in done.stderr] == [] and "untrained" in done.stderr
    assert {path.name for path in models.iterdir()} == {"checkpoints", "clip_vision", "flexip"}


def test_a_second_run_writes_only_what_is_missing(models: Path) -> None:
    assert {path.relative_to(models).as_posix() for path in write_mini_models(models)} == FILES
    kept, lost = models / "flexip" / mini.MINI_FLEXIP, models / "checkpoints" / mini.MINI_BASE
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert write_mini_models(models) == [lost]
    assert kept.stat().st_mtime_ns == before and files(models) == FILES
    assert write_mini_models(models) == []


def test_another_file_of_that_name_is_never_replaced(models: Path) -> None:
    other = models / "clip_vision" / mini.MINI_DINO_FILE
    other.write_bytes(b"somebody's own")
    with pytest.raises(ValueError, match=f"{mini.MINI_DINO_FILE} is there and is not the mini model"):
        write_mini_models(models)
    assert other.read_bytes() == b"somebody's own" and files(models) == {f"clip_vision/{mini.MINI_DINO_FILE}"}


def test_a_folder_that_is_not_a_models_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no folder .*nowhere"):
        write_mini_models(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folder checkpoints"):
        write_mini_models(tmp_path)
    assert list(tmp_path.iterdir()) == []
