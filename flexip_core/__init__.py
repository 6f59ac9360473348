"""FlexIP (arXiv 2504.07405) without ComfyUI: network, gate, checkpoint, encoders, reference.

Nothing here imports comfy, nodes, folder_paths or server; layers and the attention function come in as arguments, so the
same code serves ComfyUI (comfy.ops), training and tests (torch.nn).
"""
