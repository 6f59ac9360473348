"""How the pack hangs together: what each package may import, no circles, nothing of ComfyUI in the core, no print, no bare except.

The rules are those of docs/code.md. Each test lists all offenders, and each is shown to fail on a planted case.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
COMFYUI = {"nodes", "folder_paths", "server", "execution", "latent_preview", "node_helpers"}

# package -> what it may import of the others: only what stands above it here
RULES = {
    "network": (),
    "pictures": (),
    "run": ("network",),
    "files": ("network", "run"),
    "checkpoint": ("files",),
    "encoders": ("network", "pictures", "files"),
    "measuring": ("network", "pictures", "run", "files"),
    "untrained": ("network", "files", "encoders"),
    "integrations": ("network", "pictures", "files", "encoders"),
    "training": ("network", "pictures", "files", "encoders", "integrations"),
    "mini_world": ("network", "pictures", "run", "files", "encoders", "measuring", "training"),
    "characters": ("network", "pictures", "files", "encoders", "measuring", "training"),
    "evaluation": ("network", "pictures", "run", "files", "encoders", "measuring", "training", "mini_world"),
    "nodes": ("network", "pictures", "run", "files", "encoders", "measuring", "training", "mini_world"),
}


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Module name -> its tree, for everything in flexip_core and nodes; a package is called after its folder."""
    found = {}
    for path in sorted([*REPO.glob("flexip_core/**/*.py"), *REPO.glob("nodes/**/*.py")]):
        name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def planted(**sources: str) -> dict[str, ast.Module]:
    """`flexip_core__run__gate="import os"`: modules that exist in the test alone."""
    return {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}


def imported(modules: Mapping[str, ast.Module], name: str) -> Iterator[tuple[int, str]]:
    """Line and full name of each thing that a module imports, wherever in it; `from . import x` counts as the module x."""
    for node in ast.walk(modules[name]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = any(other.startswith(f"{name}.") for other in modules)
                parts = name.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, *([node.module] if node.module else [])])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, module if module in modules else base) for module in inner)


def package(module: str) -> str:
    """The room of RULES that a module stands in."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "flexip_core" else first


def of_comfyui(modules: Mapping[str, ast.Module]) -> list[str]:
    return [
        f"{name}:{line} imports {what}"
        for name in modules
        if name.startswith("flexip_core")
        for line, what in imported(modules, name)
        if what.split(".")[0] in COMFYUI or what.startswith("comfy")
    ]


def against_the_rules(modules: Mapping[str, ast.Module]) -> list[str]:
    return [
        f"{name}:{line} imports {what}: {package(name)} may import {', '.join(RULES.get(package(name), ())) or 'no other'}"
        for name in modules
        for line, what in imported(modules, name)
        if what in modules and package(name) != package(what) != ""
        if package(what) not in RULES.get(package(name), ())
    ]


def circle(modules: Mapping[str, ast.Module]) -> list[str]:
    graph = {name: {what for _, what in imported(modules, name) if what in modules} - {name} for name in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def prints(modules: Mapping[str, ast.Module]) -> list[str]:
    return [
        f"{name}:{node.lineno}"
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def bare_excepts(modules: Mapping[str, ast.Module]) -> list[str]:
    return [
        f"{name}:{node.lineno}"
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


CHECKS = {
    of_comfyui: "flexip_core knows nothing of ComfyUI; what needs it belongs into nodes",
    against_the_rules: "a package imports only what docs/code.md allows it",
    circle: "modules import each other in a circle; move what both need into a third",
    prints: "use logging",
    bare_excepts: "name the exceptions",
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_rules(check) -> None:
    found = check(sources())
    assert not found, f"{CHECKS[check]}:\n" + "\n".join(found)


def test_every_package_has_a_rule_and_the_rules_have_no_way_up() -> None:
    packages = {package(name) for name in sources()} - {""}
    assert packages == set(RULES)
    seen: list[str] = []
    for name, below in RULES.items():
        assert set(below) <= set(seen), f"{name} may import {sorted(set(below) - set(seen))}, which come after it"
        seen.append(name)


def test_the_page_about_the_code_states_the_same_rules() -> None:
    """docs/code.md has a row per package: | `run/` | what it holds | network |"""
    rows = [line.split("|") for line in (REPO / "docs" / "code.md").read_text(encoding="utf-8").splitlines()]
    stated = {row[1].strip().strip("`/"): row[3].strip() for row in rows if len(row) == 5 and "`" in row[1]}
    assert stated == {name: ", ".join(below) or "nothing" for name, below in RULES.items() if name != "checkpoint"}


@pytest.mark.parametrize(
    "line",
    [
        "import comfy.ops",
        "import nodes",
        "from comfy_api.v0_0_2 import io",
        "import torch, folder_paths",
        "from ...nodes import load",
        "if x:\n        import server",
    ],
)
def test_imports_of_comfyui_are_found(line: str) -> None:
    modules = planted(flexip_core="", flexip_core__run="", flexip_core__run__gate=f"def f():\n    {line}\n")
    assert len(of_comfyui(modules)) == 1


@pytest.mark.parametrize("line", ["import torch", "from . import other", "from .nodes import x", "import os.path"])
def test_other_imports_are_no_offence(line: str) -> None:
    modules = planted(flexip_core__run="", flexip_core__run__other="", flexip_core__run__gate=line)
    assert not of_comfyui(modules) and not against_the_rules(modules)


def test_a_way_up_and_a_circle_are_found_however_they_are_written() -> None:
    for line in ("from ..run import gate", "from ..run.gate import x", "import flexip_core.run.gate"):
        modules = planted(
            flexip_core="", flexip_core__run="", flexip_core__run__gate="", flexip_core__network="",
            flexip_core__network__blocks=f"def late():\n    {line}",
        )  # fmt: skip
        assert against_the_rules(modules) == [
            "flexip_core.network.blocks:2 imports flexip_core.run.gate: network may import no other"
        ]
    names = {
        "nodes__a": "from . import b",
        "nodes__b": "def f():\n    from .c import x",
        "nodes__c": "from .a import y",
    }
    assert not circle(planted(nodes="", **names | {"nodes__c": ""}))
    assert set(circle(planted(nodes="", **names))) == {"nodes.a", "nodes.b", "nodes.c"}


def test_prints_and_bare_excepts_are_found() -> None:
    assert prints(planted(nodes__a="x.print()\nif y:\n    print(1)")) == ["nodes.a:3"]
    source = "try:\n    pass\nexcept {}:\n    pass"
    assert bare_excepts(planted(nodes__a=source.format(""))) == ["nodes.a:3"]
    assert not bare_excepts(planted(nodes__a=source.format("OSError")))
