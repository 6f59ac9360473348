"""FlexIP's checkpoint: one safetensors file whose metadata rebuilds the network (format version 1).

Metadata: `flexip.format` = "1", `flexip.config` = JSON of FlexIPConfig, and maybe `flexip.about` = JSON of where the weights come from,
which no reader needs. Tensors: `preservation.*`, `personalization.*`,
`blocks.<address>.<adapter>.to_k.weight` with ComfyUI's block addresses. Reading is strict.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save

from ..network.adapters import FlexIPNetwork
from ..network.config import FlexIPConfig, deeper_than
from .parse import parse_json
from .weights import Header, name_of, one_line, read_header, read_weights, write_atomically

FORMAT = "1"
FORMAT_KEY = "flexip.format"
CONFIG_KEY = "flexip.config"
ABOUT_KEY = "flexip.about"
_LARGEST = 65536  # of all widths and counts in a config
_ADDRESS = re.compile(r"(input|middle|output)\.\d{1,4}\.\d{1,4}")


def is_flexip(header: Header) -> bool:
    return FORMAT_KEY in header.metadata


def save_checkpoint(
    network: FlexIPNetwork,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Written beside `path` first and moved into place, so that a file with the final name is always whole.

    `about`: anything that JSON holds. ValueError for weights that `dtype` cannot hold.
    """
    tensors = {key: value.detach().to(dtype=dtype).contiguous().cpu() for key, value in network.state_dict().items()}
    metadata = {FORMAT_KEY: FORMAT, CONFIG_KEY: json.dumps(network.cfg.to_dict(), sort_keys=True)}
    if about is not None:
        metadata[ABOUT_KEY] = json.dumps(about, sort_keys=True)
    if lost := [
        key
        for key, value in network.state_dict().items()
        if value.isfinite().all() and not tensors[key].isfinite().all()
    ]:
        raise ValueError(f"{name_of(path)}: {lost[0]} has values that {dtype} cannot hold; write it in full precision.")
    # through memory: safetensors' save_file makes files that only their owner can read
    write_atomically(path, save(tensors, metadata=metadata))


def about(path: str | os.PathLike) -> dict[str, Any]:
    """What the file says of where its weights come from; {} if it says nothing that can be read."""
    try:
        found = parse_json(read_header(path).metadata.get(ABOUT_KEY, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def load_checkpoint(path: str | os.PathLike, operations: Any = nn) -> FlexIPNetwork:
    """The network with the file's weights, in the file's dtype, memory-mapped until they are used.

    Raises ValueError in one sentence for a file that is not a whole FlexIP checkpoint of this format.
    """
    header = read_header(path)
    cfg = read_config(header)
    tensors = read_weights(path)
    with torch.device("meta"):
        network = FlexIPNetwork(cfg, operations)
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def read_config(header: Header) -> FlexIPConfig:
    """What the file says about its network; ValueError in one sentence for anything but a whole FlexIP checkpoint of this format."""
    name, again = name_of(header.path), "Download or export it again."
    version = header.metadata.get(FORMAT_KEY)
    if version is None:
        raise ValueError(
            f"{name} is not a FlexIP checkpoint: its metadata has no {FORMAT_KEY!r}. Choose a file that was written by FlexIP."
        )
    if version != FORMAT:
        raise ValueError(
            f"{name} has FlexIP format {one_line(version, 20)!r}, this version of the pack reads format {FORMAT!r}. Update the pack or choose another file."
        )
    try:
        cfg = FlexIPConfig.from_dict(_parsed(header.metadata.get(CONFIG_KEY, "null")))
        _check_sane(cfg, len(header.shapes))
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in FlexIPNetwork(cfg).state_dict().items()}
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {one_line(error, 300).rstrip('.')}. {again}") from None
    missing, extra = sorted(expected.keys() - header.shapes.keys()), sorted(header.shapes.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{name} does not hold the tensors that its config describes: {len(missing)} missing{_examples(missing)}, "
            f"{len(extra)} unknown{_examples(extra)}. {again}"
        )
    for key, shape in expected.items():
        if header.shapes[key] != shape:
            raise ValueError(
                f"{name}: tensor {key} has shape {list(header.shapes[key])[:8]}, its config needs {list(shape)}. {again}"
            )
    return cfg


def _parsed(text: str) -> Any:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its metadata {CONFIG_KEY!r} is not JSON") from None
    if deeper_than(data, 5):  # config, encoder, its settings, a list in them
        raise ValueError(f"its metadata {CONFIG_KEY!r} is nested too deeply")
    return data


def _check_sane(cfg: FlexIPConfig, tensors: int) -> None:
    """Before anything is built: a config costs nothing to write, but what it describes is built layer by layer."""
    numbers = (cfg.text_width, cfg.clip.width, cfg.dino.width, cfg.detail_tokens, cfg.semantic_tokens, cfg.cls_tokens)
    sizes = (*numbers, *cfg.blocks.values(), *dataclasses.astuple(cfg.resampler))
    if max(sizes) > _LARGEST:
        raise ValueError(f"its config has the number {one_line(max(sizes), 20)}, and {_LARGEST} is the largest allowed")
    if max(cfg.resampler.depth, len(cfg.blocks)) > tensors:
        raise ValueError(f"its config describes more layers than its {tensors} tensors can make up")
    for text in (cfg.base, cfg.clip.model, cfg.dino.model):
        if text != one_line(text, 200) or not text:
            raise ValueError(f"{one_line(text, 40)!r} in its config is not the name of a base or an encoder")
    for address in cfg.blocks:
        if not _ADDRESS.fullmatch(address):
            raise ValueError(f"its config names a block {one_line(address, 40)!r}, expected one like 'input.1.0'")


def _examples(keys: list[str]) -> str:
    return f" ({', '.join(one_line(key, 80) for key in keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""
