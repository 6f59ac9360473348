"""One real ComfyUI server, with the pack and the mini models, for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "scripts"))
import environment
from server import ComfyServer

from flexip_core.untrained import mini

PACK = "flexip"  # its folder's name in custom_nodes
REFERENCE = "astronaut.png"  # in ComfyUI's input folder
BROWSER_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs a browser, so that -m "not page" is what goes over HTTP."""
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker("page")


@pytest.fixture(scope="session")
def comfyui_tree() -> Path:
    tree = os.environ.get("COMFYUI_TREE", "")
    if not Path(tree, "main.py").is_file():
        pytest.exit("COMFYUI_TREE must name ComfyUI's folder. Run these tests with python3 scripts/test.py.", 4)
    return Path(tree)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's base folder: models, custom_nodes, input, output, user."""
    return tmp_path_factory.mktemp("comfyui")


@pytest.fixture(scope="session")
def models(base: Path) -> Path:
    """The server's models folder, with the mini models in it."""
    mini.make_mini_models(base / "models")
    return base / "models"


@pytest.fixture(scope="session")
def comfy(comfyui_tree: Path, base: Path, models: Path) -> Iterator[ComfyServer]:
    import skimage.data

    with ComfyServer(comfyui_tree, base, packs={PACK: REPO}) as server:
        shutil.copyfile(Path(skimage.data.__file__).parent / REFERENCE, base / "input" / REFERENCE)
        yield server


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a browser; without one the test is skipped, but not in CI."""
    path = environment.find_browser()
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(environment.NO_BROWSER)
    return path
