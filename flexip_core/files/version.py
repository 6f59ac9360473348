"""Which version of the pack this is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]


def pack_version() -> dict[str, str]:
    """Of the pack on this machine."""
    text = (PACK / "pyproject.toml").read_text(encoding="utf-8") if (PACK / "pyproject.toml").is_file() else ""
    version = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    return {"version": version[1] if version else "unknown", "commit": _commit()}


def _commit() -> str:
    if not (PACK / ".git").exists():  # inside ComfyUI's own repository git would give ComfyUI's commit
        return "unknown: not in git"
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(PACK), *command], capture_output=True, text=True, check=True, timeout=30
            ).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown: git does not answer"
    return commit.strip() + (" with changes" if changes.strip() else "")
