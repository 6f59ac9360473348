"""run.json: what a folder of generated pictures was made from, so that a run can be repeated, and not mixed with another.

A run may grow: more gates and more images of each prompt are the same run. Everything else that decides the pictures must stay.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.parse import Unreadable, read_json
from ..files.version import pack_version
from ..files.weights import sha256, write_atomically
from .benchmark import Benchmark
from .recipe import SAMPLER_SETTINGS, SIZE_SETTINGS, Recipe, differences

FORMAT = 1
NAME = "run.json"
SEED_RULE = "of each picture: the first 8 hex digits of sha256('<seed>/<name of the picture>'); the same at every gate"
UNKNOWN = "unknown: on the server"
WEIGHT_FILE = re.compile(r"[^\s,;:()]+\.(?:safetensors|sft|ckpt|pt|pth|bin)\b")
MAY_GROW = ("images", "packs", "servers", "report")
FROM_PROMPT = (*SAMPLER_SETTINGS, *SIZE_SETTINGS, "negative", "gate")  # compared there
MOST_DIFFERENCES = 3


def header(
    benchmark: Benchmark,
    recipe: Recipe,
    method: str,
    workflow: str,
    knob: str,
    values: Sequence[float],
    images: int,
    seed: int,
    reference: int | str,
    models: Path | None,
) -> dict[str, Any]:
    """`models`: a server's models folder, if it can be read from here; then the weight files are hashed."""
    return {
        "format": FORMAT,
        "method": method,
        "packs": [pack_version()],
        "benchmark": benchmark.name,
        "benchmark_sha256": _hash_of_benchmark(benchmark),
        "subjects": len({case.subject.name for case in benchmark.cases}),
        "cases": len(benchmark.cases),
        "images": images,
        "reference": reference,
        "knob": knob,
        f"{knob}s": list(values),
        **({} if knob == "gate" and values else {"gate": recipe.gate()}),
        "seed": seed,
        "seed_rule": SEED_RULE,
        **recipe.header(),
        "files": hash_files(_files_of(recipe.prompt), models),
        "servers": [],
        "report": None,
        "workflow": {"name": workflow, "sha256": _sha256(_canonical(recipe.prompt)), "prompt": recipe.prompt},
    }


def joined(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The header of a folder to which `wanted` is added. ValueError, a sentence with what differs, if it holds another run."""
    path = folder / NAME
    if not path.is_file():
        return wanted
    try:
        found = read_json(path)
        if found["format"] != FORMAT:
            raise ValueError(
                f"{path} has the format {found['format']}, this version reads {FORMAT}; use another folder."
            )
        other = _differences(found, wanted)
    except (KeyError, TypeError, AttributeError, Unreadable):
        raise ValueError(f"{path} is not the header of a run; use another folder.") from None
    if other:
        more = f" and {len(other) - MOST_DIFFERENCES} more" if len(other) > MOST_DIFFERENCES else ""
        raise ValueError(
            f"{folder} holds another run ({'; '.join(other[:MOST_DIFFERENCES])}{more}). "
            "Use the settings of that run, or another folder."
        )
    values, files = f"{wanted['knob']}s", wanted["files"]
    return {
        **wanted,
        "images": max(found["images"], wanted["images"]),
        values: sorted({*found[values], *wanted[values]}),
        "files": {**found["files"], **{place: _better(found["files"].get(place), new) for place, new in files.items()}},
        "packs": [*found["packs"], *(pack for pack in wanted["packs"] if pack not in found["packs"])],
        "servers": found["servers"],
        "report": found["report"],
    }


def write(folder: Path, data: Mapping[str, Any]) -> None:
    write_atomically(folder / NAME, json.dumps(data, indent=1, ensure_ascii=False).encode())


def with_servers(data: Mapping[str, Any], stats: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`stats`: the answers to GET /system_stats."""
    servers = list(data["servers"])
    for answer in stats:
        system, devices = answer.get("system", {}), answer.get("devices", [])
        server = {
            "comfyui": system.get("comfyui_version"),
            "pytorch": system.get("pytorch_version"),
            "device": devices[0].get("name") if devices else None,
        }
        if server not in servers:
            servers.append(server)
    return {**data, "servers": servers}


def with_report(data: Mapping[str, Any], report: str, models: Path | None) -> dict[str, Any]:
    """`report`: FlexIPSampler's. It names the encoders that "auto" found."""
    named = {f"report {name}": name for name in dict.fromkeys(WEIGHT_FILE.findall(report))}
    known = {entry["name"] for entry in data["files"].values()}
    new = {place: name for place, name in named.items() if name not in known}
    return {**data, "report": report, "files": {**data["files"], **hash_files(new, models)}}


def hash_files(names: Mapping[str, str], models: Path | None) -> dict[str, dict[str, str]]:
    """place -> name as the server lists it  ->  place -> {"name", "sha256"}"""
    return {place: {"name": name, "sha256": _hash_of_file(name, models)} for place, name in names.items()}


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    free = (*MAY_GROW, *FROM_PROMPT, f"{wanted['knob']}s", "files", "workflow")
    other = [
        f"{name}: {found.get(name)!r} there, {wanted[name]!r} now"
        for name in wanted
        if name not in free and found.get(name) != wanted[name]
    ]
    values = [data.get(f"{wanted['knob']}s") for data in (found, wanted)]
    if not other and bool(values[0]) != bool(values[1]):
        other.append(f"{wanted['knob']}s: {values[0] or 'none'} there, {values[1] or 'none'} now")
    for place, entry in wanted["files"].items():
        there = found["files"].get(place, entry)
        if there["name"] == entry["name"] and len({there["sha256"], entry["sha256"]} - {UNKNOWN}) > 1:
            other.append(f"the file {entry['name']} has changed")
    return other + differences(found["workflow"]["prompt"], wanted["workflow"]["prompt"])


def _better(found: dict[str, str] | None, wanted: dict[str, str]) -> dict[str, str]:
    return found if found and wanted["sha256"] == UNKNOWN else wanted


def _files_of(prompt: Mapping[str, Any]) -> dict[str, str]:
    """Every weight file that the prompt names: "CheckpointLoaderSimple (1).ckpt_name" -> name"""
    return {
        f"{node['class_type']} ({key}).{name}": value
        for key, node in prompt.items()
        for name, value in node["inputs"].items()
        if isinstance(value, str) and re.search(WEIGHT_FILE.pattern + "$", value)
    }


def _hash_of_file(name: str, models: Path | None) -> str:
    if models is None:
        return UNKNOWN
    found = sorted(path for path in models.glob(f"*/{_escaped(name)}") if path.is_file())
    if len(found) != 1:
        return UNKNOWN
    with found[0].open("rb") as file:
        return sha256(file)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name.replace("\\", "/"))


def _hash_of_benchmark(benchmark: Benchmark) -> str:
    """Of the names, prompts and references."""
    subjects = {case.subject.name: case.subject for case in benchmark.cases}
    pictures = {name: [_sha256(path.read_bytes()) for path in one.references] for name, one in subjects.items()}
    cases = sorted((case.subject.name, case.number, case.prompt) for case in benchmark.cases)
    return _sha256(_canonical([pictures, cases]))


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
