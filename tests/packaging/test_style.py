"""What the linter, the formatter and the type checker say, as pyproject.toml sets them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


TYPED = ("flexip_core.network", "flexip_core.run", "nodes")
MOST_IGNORED = 10


def answer(*command: str, where: Path = REPO) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", *command], cwd=where, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("command", [("check", "--no-cache"), ("format", "--check", "--no-cache")], ids=" ".join)
def test_ruff_finds_nothing(command: tuple[str, ...]) -> None:
    code, text = answer("ruff", *command, "--quiet", ".")
    assert code == 0, text


def test_the_type_checker_finds_nothing(tmp_path: Path) -> None:
    """The pack is one package, whose name is that of its folder; here it gets one that is an identifier anywhere."""
    (tmp_path / "pack").symlink_to(REPO, target_is_directory=True)
    settings = ("--config-file", str(REPO / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache"))
    packages = [part for name in TYPED for part in ("--package", f"pack.{name}")]
    code, text = answer("mypy", *settings, *packages, where=tmp_path)
    assert code == 0, text


def test_the_type_checker_is_told_to_be_silent_rarely_and_why() -> None:
    lines = [
        line
        for folder in ("flexip_core", "nodes")
        for path in REPO.glob(f"{folder}/**/*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "# type: ignore" in line
    ]
    assert len(lines) <= MOST_IGNORED
    for line in lines:
        assert re.search(r"# type: ignore\[[\w, -]+\]  # \w", line), line
