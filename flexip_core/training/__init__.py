"""Training of FlexIP adapters on a frozen base: plain PyTorch, the adapters, gate, attention and checkpoint code of inference.

Needs the optional extra `train` (diffusers). Nothing that runs in ComfyUI imports from here.
"""
