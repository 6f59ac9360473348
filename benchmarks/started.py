"""ComfyUI in this process, started as its main.py starts it: its arguments, then on an NVIDIA card its dynamic VRAM."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPU_ARGUMENTS = ("--cpu", "--use-pytorch-cross-attention")


def start_comfyui(tree: Path, device: str, *arguments: str) -> None:
    """ComfyUI's packages and the modules beside this one become importable; ComfyUI's parser sees only `arguments`."""
    sys.path[:] = [str(tree), str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != HERE.parent)]
    own, sys.argv = sys.argv, [sys.argv[0], *(CPU_ARGUMENTS if device == "cpu" else ()), *arguments]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = own
    import utils.extra_config  # noqa: F401 - as main.py: older nodes.py puts comfy/ first, and its utils would hide this

    if hasattr(comfy.cli_args, "enables_dynamic_vram") and comfy.cli_args.enables_dynamic_vram():
        _start_dynamic_vram()


def _start_dynamic_vram() -> None:
    """What main.py does about comfy-aimdo; without an NVIDIA card, or without a working comfy-aimdo, nothing changes."""
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy.model_patcher

    if not mm.is_nvidia() or mm.is_wsl():
        return
    if hasattr(comfy_aimdo.control, "init_devices"):
        headroom = int(getattr(comfy.cli_args.args, "vram_headroom", 0) * 1024**3)
        try:
            ready = comfy_aimdo.control.init_devices((d.index, headroom) for d in mm.get_all_torch_devices())
        except TypeError:  # its protocol before 0.4.10
            ready = comfy_aimdo.control.init_devices(d.index for d in mm.get_all_torch_devices())
    else:  # before ComfyUI knew several cards
        ready = comfy_aimdo.control.init_device(mm.get_torch_device().index)
    if ready:
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def dynamic_vram() -> bool:
    """Whether models are managed by ComfyUI's dynamic VRAM in this process."""
    import comfy.memory_management

    return bool(getattr(comfy.memory_management, "aimdo_enabled", False))
