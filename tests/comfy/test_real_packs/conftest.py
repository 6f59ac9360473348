"""Tests beside the code of other packs, of which the tester has a checkout; nothing of it is in this repository.

    python3 scripts/test.py --only comfy --neighbour DIR [--neighbour DIR ...] [-k test_packs]

Without the option none of these tests exist. pytest reads this file early enough for an option because the folder's name begins with
"test" and its parent is on the command line.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

OPTION = "--neighbour"
# the file with the tests -> what only that pack's checkout has
PACKS = {
    "test_packs_ip_adapter_plus.py": "IPAdapterPlus.py",
    "test_packs_pulid.py": "pulid.py",
    "test_packs_advanced_controlnet.py": "adv_control",
    "test_packs_animatediff_evolved.py": "animatediff",
    "test_packs_cgem156.py": "scripts/attention_couple/node.py",
    "test_packs_ppm.py": "src/attention_couple/unet_couple.py",
    "test_packs_a8r8.py": "attention_couple.py",
    "test_packs_tooling_nodes.py": "region.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        OPTION,
        action="append",
        default=[],
        metavar="DIR",
        help="a checkout of a pack to test FlexIP beside; repeatable",
    )


def pytest_configure(config: pytest.Config) -> None:
    for folder in config.getoption(OPTION):
        if not any(Path(folder, sign).exists() for sign in PACKS.values()):
            raise pytest.UsageError(
                f"{OPTION} {folder}: expected a checkout of IPAdapter_plus, PuLID, Advanced-ControlNet, AnimateDiff-Evolved, "
                "cgem156-ComfyUI, ComfyUI-ppm, A8R8_ComfyUI_nodes or comfyui-tooling-nodes."
            )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    sign = PACKS.get(collection_path.name)
    return True if sign and _folder(config, sign) is None else None


def _folder(config: pytest.Config, sign: str) -> Path | None:
    return next((Path(folder) for folder in config.getoption(OPTION) if Path(folder, sign).exists()), None)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """The checkout for the module's tests."""
    return _folder(request.config, PACKS[request.path.name])


@pytest.fixture(scope="module")
def pack(request: pytest.FixtureRequest, folder: Path) -> ModuleType:
    """The pack of the module's tests, imported as ComfyUI does it."""
    name = f"neighbour_{request.path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
