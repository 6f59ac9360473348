"""The former place of `flexip_core.files.checkpoint`, kept for scripts that read checkpoints by it."""

from .files.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
