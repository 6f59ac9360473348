"""FlexIP for ComfyUI: one gate between "keep this subject" and "follow my prompt" (arXiv 2504.07405)."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
