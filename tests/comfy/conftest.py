"""temporary"""
import importlib.util, os, sys
from pathlib import Path
REPO = Path(__file__).resolve().parents[2]
sys.path = [os.environ["COMFYUI_TREE"]] + [p for p in sys.path if Path(p or ".").resolve() != REPO]
sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.model_management
spec = importlib.util.spec_from_file_location("flexip_pack", REPO / "__init__.py", submodule_search_locations=[str(REPO)])
module = importlib.util.module_from_spec(spec); sys.modules["flexip_pack"] = module
sys.path.insert(1, str(Path(__file__).parent))
from unittest.mock import MagicMock
for n in ("weights","encoders","encoder_files","images"):
    if not (REPO/"flexip_core"/f"{n}.py").exists(): sys.modules["flexip_pack.flexip_core."+n]=MagicMock(CROPS=("center",))
spec.loader.exec_module(module)
