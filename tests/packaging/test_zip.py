"""What the ComfyUI registry installs: `comfy node pack` in a clone, unpacked."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "scripts")]
from server import ComfyServer

from flexip_core.evaluation.workflow import set_inputs, to_prompt

ENTRIES = {
    ".comfyignore", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "flexip_core", "locales", "nodes", "pyproject.toml",
    "requirements.txt", "scripts", "web", "workflows",
}  # fmt: skip
PARTS = {
    "flexip_core": {
        "__init__.py", "checkpoint.py", "encoders", "evaluation", "files", "integrations", "measuring", "mini_world", "network",
        "pictures", "run", "training",
    },
    "flexip_core/mini_world": {"__init__.py", "architecture.py", "encoders.py", "files.py", "optimizer.py", "text.py", "weights", "world.py"},
    "flexip_core/mini_world/weights": {f"{name}.safetensors" for name in ("adapters", "base", "clip", "clip_text", "dino")},
    "scripts": {"check_weights.py", "example_data.py"},
}  # fmt: skip
MOST = 1_500_000  # bytes without weights
# a command that says, where this is missing, that it needs the repository
RESEARCH = {
    ("flexip_core/evaluation/__main__.py", f"flexip_core.mini_world.{name}") for name in ("runs", "scored", "task")
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    variables = {**os.environ, "HOME": str(folder), "USERPROFILE": str(folder)}  # comfy keeps its settings there

    def run(*command: str | Path, where: Path = folder) -> None:
        done = subprocess.run(list(map(str, command)), cwd=where, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    comfy = (sys.executable, "-m", "comfy_cli", "--skip-prompt")
    run("git", "clone", "--quiet", REPO, "clone")
    run(*comfy, "tracking", "disable")
    run(*comfy, "--no-json", "node", "pack", where=folder / "clone")
    return folder / "clone" / "node.zip"


@pytest.fixture(scope="module")
def installed(packed: Path) -> Path:
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(packed.parents[1] / "flexip")
    return packed.parents[1] / "flexip"


def test_the_zip_holds_what_users_need_and_no_more(installed: Path) -> None:
    assert {path.name for path in installed.iterdir()} == ENTRIES
    for folder, names in PARTS.items():
        assert {path.name for path in (installed / folder).iterdir()} == names, folder


def test_the_zip_is_small(packed: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
    assert sum(size for name, size in sizes.items() if not name.endswith(".safetensors")) <= MOST


def imports(path: Path, root: Path) -> Iterator[str]:
    """Dotted names below `root` that a file imports, also within functions; of `from a import b` both a and a.b."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_module(name: str, root: Path) -> bool:
    place = root.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def test_every_module_that_a_packed_module_imports_is_packed(installed: Path) -> None:
    """A name is ours if the repository has a module of that name, in its root or, for a script, beside it."""
    missing = set()
    for path in sorted(installed.rglob("*.py")):
        place = path.relative_to(installed)
        folders = [Path(), place.parent] if place.parts[0] == "scripts" else [Path()]
        for name in imports(path, installed):
            for folder in folders:
                if name and is_module(name, REPO / folder) and not is_module(name, installed / folder):
                    missing.add((place.as_posix(), name))
    assert missing == RESEARCH


def test_comfyui_runs_the_demo_with_the_pack_as_it_is_installed(installed: Path, tmp_path: Path) -> None:
    promised = json.loads((REPO / "tests" / "comfy" / "schema_snapshot.json").read_text(encoding="utf-8"))
    with ComfyServer(os.environ["COMFYUI_TREE"], tmp_path, packs={"flexip": installed}) as comfy:
        nodes = comfy.get("/object_info")
        assert set(promised) <= nodes.keys()
        prompt = to_prompt(json.loads((installed / "workflows" / "flexip_demo_world.json").read_bytes()), nodes)
        set_inputs(prompt, "EmptyLatentImage", width=64, height=64)
        set_inputs(prompt, "FlexIPSampler", steps=1)
        comfy.run(prompt)
