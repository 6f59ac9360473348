"""What the registry, pip and ComfyUI-Manager see of the pack."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "scripts"))
import environment

BROUGHT_BY_COMFYUI = {
    "torch",
    "torchvision",
    "torchaudio",
    "numpy",
    "transformers",
    "einops",
    "safetensors",
    "pillow",
    "scipy",
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def requirements() -> list[str]:
    return [line for line in (REPO / "requirements.txt").read_text().splitlines() if line.strip() and line[0] != "#"]


def pyproject() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_leave_comfyuis_packages_alone() -> None:
    for line in requirements():
        name, bound = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", line).groups()  # a lower bound and nothing else
        assert name.lower() not in BROUGHT_BY_COMFYUI and bound


def test_pyproject_lists_the_same_requirements() -> None:
    assert pyproject()["project"]["dependencies"] == requirements()


def test_pyproject_holds_what_the_registry_wants() -> None:
    project, comfy = pyproject()["project"], pyproject()["tool"]["comfy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"file": "LICENSE"} and "Apache License" in (REPO / "LICENSE").read_text()
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert comfy["PublisherId"] and comfy["DisplayName"] == "FlexIP"
    assert comfy["requires-comfyui"] == f">={environment.COMFYUI_OLDEST}"


def test_comfy_node_validate_passes(tmp_path: Path) -> None:
    variables = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}  # it keeps its settings there

    def comfy(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", *arguments]
        return subprocess.run(command, env=variables, cwd=REPO, check=True, capture_output=True, text=True)

    comfy("tracking", "disable")
    answer = comfy("--no-json", "node", "validate")
    # it exits with 0 when it has warnings
    assert "All validation checks passed" in answer.stdout, answer.stdout + answer.stderr


@pytest.mark.parametrize("version", PYTHONS)
def test_requirements_resolve(version: str, tmp_path: Path) -> None:
    """With the torch that we install and ComfyUI's own requirements, wheels only."""
    everything = tmp_path / "requirements.txt"
    comfyui = Path(os.environ["COMFYUI_TREE"], "requirements.txt").read_text(encoding="utf-8")
    everything.write_text("\n".join([*environment.TORCH.split(), comfyui, *requirements()]), encoding="utf-8")
    command = ["uv", "pip", "compile", "--quiet", "--only-binary", ":all:", "--python-version", version, everything]
    resolved = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert resolved.returncode == 0, resolved.stderr
    names = set(re.findall(r"^([a-z0-9-]+)==", resolved.stdout, re.MULTILINE))
    assert {"open-clip-torch", "timm", "torch", "transformers"} <= names


@pytest.mark.parametrize("version", PYTHONS)
def test_syntax_compiles(version: str) -> None:
    """No file needs a newer grammar. (Nothing that an older Python took was dropped up to 3.13.)"""
    feature_version = tuple(map(int, version.split(".")))
    for folder in ("flexip_core", "nodes", "scripts", "tests", "benchmarks"):
        for path in REPO.glob(f"{folder}/**/*.py"):
            ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=feature_version)
