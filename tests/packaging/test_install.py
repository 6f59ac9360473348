"""Installing FlexIP changes nothing else (complaints 2 and 17: what a pack's requirements do to torch, numpy and the rest).

The quick tests ask the resolvers about a virtual environment in which only the packages' metadata lies, which is all
that they look at. The long ones install for real, into a copy of this environment made of hard links: no file of the
original can be changed there, since pip and uv remove and write anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "scripts")]
import environment
from server import CPU_ARGUMENTS, ComfyServer

from flexip_core.evaluation.workflow import set_inputs, to_prompt

COMFYUI = Path(os.environ["COMFYUI_TREE"])
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OF_EXTRAS = [line for extra in EXTRAS.values() for line in extra]
OLDEST, NEWEST = (f"{major}.{minor}" for major, minor in environment.PYTHONS)
NEVER = {
    "insightface",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "xformers",
    "opencv-python",
    "mediapipe",
    "flash-attn",
}
NOT_COMFYUIS = ("custom_nodes", "input", "models", "output", "temp", "user", "venv", "__pycache__")  # a user's own
# ComfyUI is GPL-3.0: what comes with the pack must go with that, and may not forbid any use.
LICENCES = re.compile(r"\b(Apache|BSD|MIT|ISC|PSF|Python Software Foundation|Kiwi licensing|MPL-2\.0)\b")
FORBIDDEN = re.compile(
    r"AGPL|Affero|non.?commercial|CC.BY.NC|SSPL|Business Source|research (use|only)|proprietary", re.IGNORECASE
)


def lines_of(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


REQUIREMENTS = lines_of(REPO / "requirements.txt")
COMFYUIS = lines_of(COMFYUI / "requirements.txt")


def closure(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """By name: what of this environment is needed for `requirements`, themselves included."""
    found, done, todo = {}, set(), [Requirement(line) for line in requirements]
    while todo:
        wanted = todo.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in done or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        done.add(key)
        found[key[0]] = distribution = metadata.distribution(wanted.name)
        for needed in map(Requirement, distribution.requires or ()):
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in key[1] or {""}):
                needed.marker = None
                todo.append(needed)
    return found


def torch_with(label: str) -> dict[str, str]:
    return {name: f"{metadata.version(name).split('+')[0]}+{label}" for name in ("torch", "torchvision", "torchaudio")}


def oldest_versions() -> dict[str, str]:
    """The least that ComfyUI asks for; torch as its README says, huggingface_hub as the oldest transformers has it."""
    bounds = (re.match(r"([\w.-]+)\s*[>~]=\s*([\w.]+)", line) for line in COMFYUIS)
    least = {canonicalize_name(bound[1]): bound[2] for bound in bounds if bound}
    return {**least, "torch": "2.5.0", "torchvision": "0.20.0", "torchaudio": "2.5.0", "huggingface-hub": "0.26.0"}


# ComfyUI's packages as this environment has them, but for these versions. PyPI has no torch with a label: replacing one
# loses the GPU.
KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "as tested": dict,
    "torch for CUDA": lambda: torch_with("cu130"),
    "oldest": oldest_versions,
}


def make_environment(folder: Path, versions: Mapping[str, str] | None = None, whole: bool = False) -> Path:
    """The Python of a new environment with ComfyUI's requirements and pip, and neither the pack's nor the test tools.

    `whole` links all of their files, otherwise only their metadata; `versions` is what the metadata says of some.
    """
    uv("venv", "--quiet", "--python", sys.executable, str(folder))
    python = environment.python_of(folder)
    site = Path(ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name, distribution in closure([*COMFYUIS, "pip"]).items():
        for file in distribution.files or ():
            # what lies elsewhere is commands, which name the Python that they are for
            wanted = whole or name == "pip" or file.parts[0].endswith((".dist-info", ".egg-info"))
            source, target = Path(distribution.locate_file(file)), site / file
            if wanted and ".." not in file.parts and source.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except OSError:  # another disk
                    shutil.copy2(source, target)
        if versions and name in versions:
            (folder_now,) = {file.parts[0] for file in distribution.files if file.name == "METADATA"}
            shutil.rmtree(site / folder_now)
            spelt = folder_now.split("-")[0]
            info = site / f"{spelt}-{versions[name]}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {spelt}\nVersion: {versions[name]}\n")
    return python


def run(*command: str | Path, **options: object) -> str:
    """What it prints; a failure is shown with its output."""
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, encoding="utf-8", **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def uv(*arguments: str | Path) -> str:
    return run(sys.executable, "-m", "uv", *arguments)


def ask(python: Path, code: str) -> str:
    return run(python, "-c", code)


def pip(python: Path, *arguments: str | Path) -> str:
    return run(python, "-m", "pip", "--disable-pip-version-check", *arguments)


def freeze(python: Path) -> set[str]:
    done = [python, "-m", "pip", "--disable-pip-version-check", "freeze", "--all"]
    return set(subprocess.run(done, capture_output=True, text=True, check=True).stdout.split("\n")) - {""}


class Plan(NamedTuple):
    added: set[str]
    removed: set[str]  # replaced by another version, too


def plan(python: Path, *arguments: str | Path) -> Plan:
    """The names of what uv would do in that environment, with wheels alone."""
    answer = uv("pip", "install", "--dry-run", "--only-binary", ":all:", "--python", python, *arguments)
    assert "Would" in answer, answer
    changes = re.findall(r"^ ([-+~]) ([\w.-]+)==", answer, re.MULTILINE)
    return Plan(*({canonicalize_name(name) for sign, name in changes if sign in signs} for signs in ("+", "-~")))


def names(requirements: list[str]) -> set[str]:
    applicable = (Requirement(line) for line in requirements)
    return {canonicalize_name(r.name) for r in applicable if not r.marker or r.marker.evaluate()}


@pytest.fixture(scope="module")
def full_home() -> Iterator[Path]:
    """A folder on the disk where the packages lie, since hard links reach no further."""
    with tempfile.TemporaryDirectory(dir=Path(sys.prefix).parent, prefix="flexip-install-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, full_home: Path) -> Iterator[tuple[str, Path]]:
    folder = full_home / request.param.replace(" ", "-")
    yield request.param, make_environment(folder, KINDS[request.param]())
    shutil.rmtree(folder)


def test_requirements_add_themselves_and_what_they_lack(kind: tuple[str, Path]) -> None:
    """Complaint 17: torch, numpy and all others stay, whatever version of them a user has."""
    added, removed = plan(kind[1], "--requirement", REPO / "requirements.txt")
    assert not removed
    assert names(REQUIREMENTS) <= added <= closure(REQUIREMENTS).keys() - closure(COMFYUIS).keys()


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_adds_itself_and_what_it_lacks(kind: tuple[str, Path], extra: str, tmp_path: Path) -> None:
    """Complaint 17. The newest diffusers wants a newer huggingface_hub and safetensors than the oldest ComfyUI has;
    there an older one that fits is found as soon as pip is told to keep what is there."""
    name, python = kind
    added, removed = plan(python, *EXTRAS[extra])
    assert not removed & {"torch", "torchvision", "torchaudio", "numpy", "transformers", "tokenizers"}
    if name == "oldest":
        keep = tmp_path / "keep.txt"
        keep.write_text("\n".join(freeze(python)))
        added, removed = plan(python, "--constraint", keep, *EXTRAS[extra])
    assert not removed and names(EXTRAS[extra]) <= added


def test_a_requirement_that_replaces_a_package_is_seen(kind: tuple[str, Path]) -> None:
    """Else the tests above could not fail."""
    have = json.loads(uv("pip", "list", "--quiet", "--format", "json", "--python", kind[1]))
    (torch,) = (package["version"] for package in have if package["name"] == "torch")
    assert plan(kind[1], f"torch!={torch}", "--no-deps").removed == {"torch"}


def test_nothing_that_comfyui_brings_is_asked_for_and_nothing_is_held_back() -> None:
    """Complaint 17. A bound from above, or on a package of ComfyUI's, makes pip replace what other packs rely on."""
    asked = [Requirement(line) for line in [*REQUIREMENTS, *OF_EXTRAS]]
    assert not {canonicalize_name(requirement.name) for requirement in asked} & closure(COMFYUIS).keys()
    for requirement in asked:
        assert [bound.operator for bound in requirement.specifier] == [">="] and not requirement.url, requirement


@pytest.mark.parametrize(
    "platform, python",
    [("windows", OLDEST), ("windows", NEWEST), ("macos", NEWEST), ("aarch64-unknown-linux-gnu", OLDEST)],
)
def test_wheels_are_there_for_every_system(platform: str, python: str) -> None:
    """Complaint 2: nothing is ever compiled, and insightface and its like do not come in through a back door."""
    answer = run(
        *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--only-binary", ":all:", "--no-annotate"),
        *("--python-platform", platform, "--python-version", python, "-"),
        input="\n".join([*REQUIREMENTS, *OF_EXTRAS]),
    )
    resolved = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", answer, re.MULTILINE)}
    assert names(REQUIREMENTS) <= resolved
    assert not resolved & NEVER


def test_licences_of_what_is_brought_along_go_with_comfyuis() -> None:
    brought = closure([*REQUIREMENTS, *OF_EXTRAS])
    for name in sorted(brought.keys() - closure(COMFYUIS).keys()):
        said = licence(brought[name].metadata)
        assert LICENCES.search(said) and not FORBIDDEN.search(said), f"{name}: {said[:300]}"


def licence(information: metadata.PackageMetadata) -> str:
    classifiers = [text for text in information.get_all("Classifier") or () if text.startswith("License ::")]
    return "\n".join([information.get("License-Expression") or "", information.get("License") or "", *classifiers])


@pytest.mark.parametrize(
    "said", ["AGPL-3.0-or-later", "GNU Affero General Public License v3", "CC-BY-NC-4.0", "For non-commercial use, MIT"]
)
def test_licences_that_forbid_a_use_are_seen(said: str) -> None:
    assert FORBIDDEN.search(said)


def test_import_does_nothing_but_import() -> None:
    """Beyond ComfyUI's own: no module that is not the pack's, Python's or ComfyUI's, no connection, no process, no
    thread, no file written, no look at the GPU. Python's own audit hooks see what a library does in C, too."""
    script = """
        import importlib.util, sys
        from pathlib import Path
        tree, repo = sys.argv[1:]
        sys.path.insert(0, tree)
        sys.argv = [sys.argv[0], "--cpu"]
        import comfy.options
        comfy.options.enable_args_parsing()
        import comfy.sd, comfy.sample, comfy_api.v0_0_2, folder_paths, latent_preview, nodes, torch
        from comfy_execution import graph_utils

        done, events = [], ("socket", "subprocess", "_thread", "urllib", "http", "shutil", "tempfile", "winreg")
        writing = ("os.mkdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.system", "os.putenv", "os.chdir")
        def watch(event, arguments):
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
            if opened or event in writing or event.split(".")[0] in events:
                done.append((event, arguments))
        def refuse(*arguments, **options):
            done.append(("cuda", arguments))
            raise RuntimeError("the import asks for a GPU")
        torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
        before = set(sys.modules)
        sys.addaudithook(watch)
        spec = importlib.util.spec_from_file_location("pack", repo + "/__init__.py", submodule_search_locations=[repo])
        sys.modules["pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["pack"])
        seen = list(done)

        try:  # the hook sees what it is there for
            __import__("socket").create_connection(("127.0.0.1", 9), 0.1)
        except OSError:
            pass
        assert any(event == "socket.connect" for event, _ in done)

        new = [name for name in set(sys.modules) - before if name.split(".")[0] != "pack"]
        of = {name: getattr(sys.modules[name], "__file__", None) or "" for name in new}
        foreign = [name for name, file in of.items() if name.split(".")[0] not in sys.stdlib_module_names
                   and not (file and Path(file).is_relative_to(tree))]
        assert not foreign, foreign
        assert not seen, seen
        assert len(set(sys.modules) - before) < len(before) / 20
    """
    run(sys.executable, "-B", "-c", textwrap.dedent(script), COMFYUI, REPO, cwd=COMFYUI)


@pytest.fixture(scope="module")
def full(full_home: Path) -> Path:
    """The Python of an environment in which ComfyUI runs."""
    return make_environment(full_home / "full", whole=True)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time, by its path, without what Python compiles on its own."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.long
def test_pip_freeze_differs_by_the_packs_own_packages_and_what_they_lack(full: Path) -> None:
    """Complaint 17, with pip itself; and pip takes away again what it brought, without a trace."""
    versions, site = freeze(full), full.parent.parent
    files = state_of(site)
    pip(full, "install", "--requirement", REPO / "requirements.txt")
    added = freeze(full) - versions
    assert versions < freeze(full)
    assert names(REQUIREMENTS) <= names(sorted(added)) <= closure(REQUIREMENTS).keys() - closure(COMFYUIS).keys()
    after = state_of(site)
    assert {name: after.get(name) for name in files} == files  # no file of another package was touched
    pip(full, "check")
    pip(full, "uninstall", "--yes", *names(sorted(added)))
    assert (freeze(full), state_of(site)) == (versions, files)


@pytest.fixture(scope="module")
def tree(full_home: Path) -> Path:
    """A ComfyUI of its own, since its manager installs into the tree that it belongs to."""

    def ignore(folder: str, entries: list[str]) -> set[str]:
        return {e for e in entries if e.startswith(".") or (Path(folder) == COMFYUI and e in NOT_COMFYUIS)}

    return Path(shutil.copytree(COMFYUI, full_home / "ComfyUI", ignore=ignore))


@pytest.fixture
def served(full_home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of this repository in pyproject.toml, which git takes from here: the manager refuses file:///... as
    "not a URL" (it wants a host), and the network is left out."""
    url = PROJECT["urls"]["Repository"]
    owner, name = url.rsplit("/", 1)
    try:
        run("git", "clone", "--quiet", "--bare", REPO, full_home / "served" / f"{name}.git")
    except (OSError, AssertionError):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs git and the repository")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{(full_home / 'served').as_uri()}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", f"{owner}/")
    return url


@pytest.mark.long
def test_comfyui_manager_installs_and_uninstalls_the_pack(
    full: Path, tree: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a git address, with the manager that this ComfyUI asks for: the same nodes are there after a restart, they
    run, and what remains after an uninstallation is what the user made and the packages (the manager keeps those)."""
    pack = served.rsplit("/", 1)[1]
    pinned = tree / "manager_requirements.txt"
    pip(full, "install", *(["--requirement", pinned] if pinned.is_file() else ["comfyui-manager"]))
    settings = tree / "user" / "__manager" / "config.ini"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nnetwork_mode = offline\nuse_uv = false\n")
    monkeypatch.setenv("COMFYUI_PATH", str(tree))

    def manager(*arguments: str) -> str:
        return run(full, "-m", "cm_cli", *arguments, "--mode", "local", cwd=tree)

    def server() -> ComfyServer:
        return ComfyServer(tree, tree, full, arguments=[*CPU_ARGUMENTS, "--enable-manager"])

    with server() as comfy:
        stock = set(comfy.get("/object_info"))
    (tree / "models" / "flexip").rmdir()  # made by scripts/server.py
    files, versions = state_of(tree), freeze(full)

    assert "[INSTALLED]" in (answer := manager("install", served)), answer
    added = freeze(full) - versions
    assert versions < freeze(full)
    assert names(REQUIREMENTS) <= names(sorted(added)) <= closure(REQUIREMENTS).keys() - closure(COMFYUIS).keys()
    installed = tree / "custom_nodes" / pack
    promised = json.loads((installed / "tests" / "comfy" / "schema_snapshot.json").read_text(encoding="utf-8"))
    home = full.parents[2] / "home"
    home.mkdir()
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("UV_CACHE_DIR", str(home.with_name("uv")))  # the manager asks uv what is installed
    with server() as comfy:
        nodes = comfy.get("/object_info")
        assert pack in comfy.get("/v2/customnode/installed")
        prompt = to_prompt(json.loads((installed / "workflows" / "flexip_demo_world.json").read_bytes()), nodes)
        set_inputs(prompt, "EmptyLatentImage", width=64, height=64)
        set_inputs(prompt, "FlexIPSampler", steps=1)
        comfy.run(prompt)
    assert list(home.iterdir()) == []  # no cache, no settings outside ComfyUI's folder
    new = nodes.keys() - stock
    assert set(promised) <= new and stock < nodes.keys()
    assert {nodes[node]["python_module"] for node in new} == {f"custom_nodes.{pack}"}

    assert "[UNINSTALLED]" in (answer := manager("uninstall", pack)), answer
    pip(full, "uninstall", "--yes", *names(sorted(added)))
    assert freeze(full) == versions
    assert not installed.exists()
    left = state_of(tree).keys() ^ files.keys()
    the_managers = "user/__manager/"  # its history and cache; the logs have the server's port in their names
    assert [
        name for name in left if not name.startswith(("output/", "temp/", the_managers)) and name[-4:] != ".log"
    ] == []
