"""Finds the nodes of the ComfyUI under test that change a model's patches, wrappers, options or weights, by reading its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TOUCHES = re.compile(
    r"set_model_(?!sampler_noise)\w+|add_wrapper(_with_key)?|add_object_patch|add_weight_wrapper|set_injections|add_patches"
    r"|create_multigpu_deepclones|set_torch_compile_wrapper|load_(bypass_)?lora\w*|ModelMergeBlocks"
    r"|patches_replace|patches|attn1|attn2|optimized_attention_override|model_function_wrapper|context_handler"
)


def _words(tree: ast.AST) -> Iterator[str]:
    for part in ast.walk(tree):
        if isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def _nodes_in(path: Path) -> Iterator[str]:
    """Ids of the nodes in a file whose class, or what it uses of the file, touches a model."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {part.name: part for part in tree.body if isinstance(part, (ast.FunctionDef, ast.ClassDef))}
    used = {name: set(_words(part)) for name, part in parts.items()}
    touching = {name for name, own in used.items() if any(map(TOUCHES.fullmatch, own))}
    while more := {name for name, own in used.items() if own & touching} - touching:
        touching |= more
    pairs = [pair for part in ast.walk(tree) if isinstance(part, ast.Dict) for pair in zip(part.keys, part.values)]
    mapped = [(v.id, k.value) for k, v in pairs if isinstance(k, ast.Constant) and isinstance(v, ast.Name)]
    for name in touching:
        calls = (part for part in ast.walk(parts[name]) if isinstance(part, ast.Call))
        ids = [word.value.value for part in calls for word in part.keywords if word.arg == "node_id"]
        if isinstance(parts[name], ast.ClassDef):
            yield from ids[:1] or [id for cls, id in mapped if cls == name]


def nodes_that_touch_a_model(tree: Path) -> set[str]:
    files = [*(tree / "comfy_extras").glob("*.py"), tree / "nodes.py"]
    return {id for path in files for id in _nodes_in(path)}
