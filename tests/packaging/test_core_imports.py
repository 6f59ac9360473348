"""flexip_core knows nothing of ComfyUI, and neither it nor the nodes print or swallow errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
CORE = sorted(REPO.glob("flexip_core/**/*.py"))
NODES = sorted(REPO.glob("nodes/**/*.py"))
FORBIDDEN = {"nodes", "folder_paths", "server", "execution", "latent_preview", "node_helpers"}


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def violations(source: str, depth: int = 1) -> list[str]:
    """`depth`: how many leading dots of a relative import still mean flexip_core."""
    found = []
    for name in imported(ast.parse(source)):
        dots = len(name) - len(name.lstrip("."))
        top = name.lstrip(".").split(".")[0]
        if dots > depth or (dots == 0 and (top in FORBIDDEN or top.startswith("comfy"))):
            found.append(name)
    return found


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_core_imports_no_comfyui(path: Path) -> None:
    depth = len(path.relative_to(REPO / "flexip_core").parts)
    assert violations(path.read_text(encoding="utf-8"), depth) == []


@pytest.mark.parametrize(
    "line",
    [
        "import comfy.ops",
        "import nodes",
        "from comfy_api.v0_0_2 import io",
        "import server",
        "from ..nodes import load",
        "import torch, folder_paths",
    ],
)
def test_the_rule_finds_imports_of_comfyui(line: str) -> None:
    assert violations(f"def f():\n    {line}\n")


@pytest.mark.parametrize("line", ["import torch", "from . import gate", "from .nodes import x", "import os.path"])
def test_the_rule_allows_the_rest(line: str) -> None:
    assert not violations(f"def f():\n    {line}\n")


@pytest.mark.parametrize("path", CORE + NODES, ids=name_of)
def test_no_print_and_no_bare_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{name_of(path)}:{node.lineno}: use logging"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name_of(path)}:{node.lineno}: name the exceptions"
