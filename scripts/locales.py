#!/usr/bin/env python3
"""Writes locales/en/nodeDefs.json from the nodes' schemas and says what the Chinese texts lack. Run it with ComfyUI's Python:

    python scripts/locales.py --comfyui DIR [--check]

The page takes English texts from the file, too, so it must be written again when a schema changes; a test compares them.
Sockets that appear one by one (io.Autogrow) have one key each, and the page knows their tooltips from here only. They all say the
same, so in Chinese only the first is written by hand. With --check nothing is written, and the exit code tells.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

REPO = Path(__file__).resolve().parents[1]
LOCALES = REPO / "locales"
NODES = "nodeDefs.json"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
SYNTAX = re.compile(r"[@{}|]")  # the page takes these for its own in names and descriptions, but not in tooltips
NAMES = frozenset({"cfg", "CLIP", "CLIP-I", "CLIP-T", "DINO-I", "Latent", "VAE"})  # the same in Chinese
Texts = dict[str, Any]


def english(nodes: Iterable[Any]) -> dict[str, Texts]:
    """{node id: its texts} in the form of nodeDefs.json, from the classes' schemas."""
    schemas = [node.define_schema() for node in nodes]
    return {schema.node_id: _texts(schema) for schema in schemas}


def _texts(schema: Any) -> Texts:
    inputs = {}
    for entry in schema.inputs:
        inputs[entry.id] = {"name": entry.display_name or entry.id, "tooltip": entry.tooltip}
        inputs |= {_key(entry.id, socket.id): {"tooltip": socket.tooltip} for socket in _sockets(entry)}
    outputs = {
        str(number): {"name": output.display_name or output.id, "tooltip": output.tooltip}
        for number, output in enumerate(schema.outputs)
    }
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        **({"outputs": outputs} if outputs else {}),
    }


def _sockets(entry: Any) -> list[Any]:
    """The sockets that an Autogrow input can have; they are labelled by the page."""
    template = getattr(entry, "template", None)
    return template.get_all() if template else []


def _key(group: str, socket: str) -> str:
    return f"{group}_{socket}"  # the page writes a dot into the socket's name, and an underscore for it into the key


def with_repeated_sockets(texts: Mapping[str, Texts], english: Mapping[str, Texts]) -> dict[str, Texts]:
    """In the order of the English ones; a socket whose English text is that of an earlier one gets that one's text, too."""
    out = {}
    for node_id, node in english.items():
        if node_id not in texts:
            continue
        mine = texts[node_id].get("inputs", {})
        inputs, first = {}, {}
        for key, entry in node["inputs"].items():
            twin = first.setdefault(entry["tooltip"], key) if "name" not in entry else key
            if twin in mine:
                inputs[key] = mine[twin]
        extra = {key: entry for key, entry in mine.items() if key not in node["inputs"]}
        out[node_id] = {**texts[node_id], "inputs": {**inputs, **extra}}
    return out | {node_id: node for node_id, node in texts.items() if node_id not in english}


def leaves(texts: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in texts.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def faults(language: str, texts: Mapping[str, Texts], english: Mapping[str, Texts]) -> list[str]:
    """What `texts` lacks, holds for nothing or says in the wrong language, one line each."""
    mine, wanted = dict(leaves(texts)), dict(leaves(english))
    lines = [f"{language}: {'.'.join(path)} is missing: {text}" for path, text in wanted.items() if path not in mine]
    for path, text in mine.items():
        where = f"{language}: {'.'.join(path)}"
        if path not in wanted:
            lines.append(f"{where} belongs to nothing")
        elif not isinstance(text, str) or not text.strip():
            lines.append(f"{where} is empty")
        elif path[-1] != "tooltip" and SYNTAX.search(text):
            lines.append(f"{where} has one of @ {{ }} |, which the page does not show: {text}")
        elif language == "zh" and not CHINESE.search(text) and text not in NAMES:
            lines.append(f"{where} is not Chinese: {text}")
    return lines


def changes(old: Mapping[str, Texts], new: Mapping[str, Texts]) -> list[tuple[str, str, str]]:
    """(where, old text, new text) of what is said differently."""
    before = dict(leaves(old))
    return [(".".join(path), before[path], text) for path, text in leaves(new) if before.get(path, text) != text]


def read(path: Path) -> dict[str, Any]:
    """A JSON object in which no key comes twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"{path}: {', '.join(sorted(twice))} comes twice in one object.")
        return dict(pairs)

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)


def as_text(texts: Mapping[str, Any]) -> str:
    return json.dumps(texts, ensure_ascii=False, indent=2) + "\n"


def load_pack(comfyui: Path) -> ModuleType:
    """The pack, as a package of its own; its folder is not on the path, where its nodes/ would hide ComfyUI's nodes.py."""
    hidden = {REPO, REPO / "scripts"}
    sys.path[:] = [str(comfyui), *(entry for entry in sys.path if Path(entry or ".").resolve() not in hidden)]
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # reads sys.argv

    sys.argv = arguments
    spec = importlib.util.spec_from_file_location(
        "flexip_pack", REPO / "__init__.py", submodule_search_locations=[str(REPO)]
    )
    sys.modules["flexip_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["flexip_pack"])
    return sys.modules["flexip_pack"]


def node_classes(pack: ModuleType) -> list[Any]:
    async def classes() -> list[Any]:
        return await (await pack.comfy_entrypoint()).get_node_list()

    return asyncio.run(classes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, type=Path, metavar="DIR", help="ComfyUI's folder")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    if not (options.comfyui / "main.py").is_file():
        parser.error(f"{options.comfyui} is not ComfyUI's folder: it has no main.py.")
    current = english(node_classes(load_pack(options.comfyui.resolve())))
    path = LOCALES / "en" / NODES
    for where, old, new in changes(read(path) if path.exists() else {}, current):
        print(f"{where} has changed, look whether the other languages still say the same: {old} -> {new}")
    files = {"en": current}
    for folder in sorted(path for path in LOCALES.iterdir() if path.name != "en"):
        files[folder.name] = with_repeated_sockets(read(folder / NODES), current)
    bad = False
    for language, texts in files.items():
        path, lines = LOCALES / language / NODES, faults(language, texts, current)
        if options.check and (not path.exists() or path.read_text(encoding="utf-8") != as_text(texts)):
            lines.append(f"{language}: {NODES} has not been written since something changed; run this without --check")
        if not options.check:
            path.write_text(as_text(texts), encoding="utf-8")
        print("\n".join(lines or [f"{language}: {len(texts)} nodes, complete"]))
        bad |= bool(lines)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
