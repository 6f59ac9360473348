"""ComfyUI in this process, on the CPU, with the pack as the package `flexip_pack` (so that `nodes` is ComfyUI's)."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TREE = os.environ.get("COMFYUI_TREE", "")
if not Path(TREE, "main.py").is_file():
    raise pytest.UsageError("COMFYUI_TREE must name ComfyUI's folder. Run these tests with python3 scripts/test.py.")

# With the repository on the path (pytest.ini puts it there for tests/core), our nodes/ would shadow ComfyUI's nodes.py.
sys.path[:] = [TREE, *(entry for entry in sys.path if Path(entry or ".").resolve() != REPO)]

arguments = sys.argv
sys.argv = [arguments[0], "--cpu", "--use-pytorch-cross-attention"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.cli_args
import utils.extra_config  # noqa: F401 - as main.py: older nodes.py puts comfy/ first, and its utils would hide this

sys.argv = arguments

location = REPO / "__init__.py"
spec = importlib.util.spec_from_file_location("flexip_pack", location, submodule_search_locations=[str(REPO)])
sys.modules["flexip_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["flexip_pack"])


@pytest.fixture(scope="session", autouse=True)
def temp_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Previews go here, not into the installation; each process of pytest-xdist has a folder of its own."""
    import folder_paths

    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("temp")))
