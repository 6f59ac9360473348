"""FlexIP's checkpoint: one safetensors file whose metadata rebuilds the network (format version 1).

Metadata: `flexip.format` = "1" and `flexip.config` = JSON of FlexIPConfig. Tensors: `preservation.*`, `personalization.*`,
`blocks.<address>.<adapter>.to_k.weight` with ComfyUI's block addresses. Reading is strict.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save

from .adapters import FlexIPNetwork
from .config import FlexIPConfig
from .weights import Header, read_header, read_tensors, write_atomically

FORMAT = "1"
FORMAT_KEY = "flexip.format"
CONFIG_KEY = "flexip.config"


def is_flexip(header: Header) -> bool:
    return FORMAT_KEY in header.metadata


def save_checkpoint(network: FlexIPNetwork, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Written beside `path` first and moved into place, so that a file with the final name is always whole."""
    tensors = {key: value.detach().to(dtype=dtype).contiguous().cpu() for key, value in network.state_dict().items()}
    metadata = {FORMAT_KEY: FORMAT, CONFIG_KEY: json.dumps(network.cfg.to_dict(), sort_keys=True)}
    # through memory: safetensors' save_file makes files that only their owner can read
    write_atomically(path, save(tensors, metadata=metadata))


def load_checkpoint(path: str | os.PathLike, operations: Any = nn) -> FlexIPNetwork:
    """The network with the file's weights, in the file's dtype, memory-mapped until they are used.

    Raises ValueError in one sentence for a file that is not a whole FlexIP checkpoint of this format.
    """
    header = read_header(path)
    cfg = _checked_config(header)
    tensors = read_tensors(path)
    with torch.device("meta"):
        network = FlexIPNetwork(cfg, operations)
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _checked_config(header: Header) -> FlexIPConfig:
    name = Path(header.path).name
    version = header.metadata.get(FORMAT_KEY)
    if version is None:
        raise ValueError(
            f"{name} is not a FlexIP checkpoint: its metadata has no {FORMAT_KEY!r}. Choose a file that was written by FlexIP."
        )
    if version != FORMAT:
        raise ValueError(
            f"{name} has FlexIP format {version!r}, this version of the pack reads format {FORMAT!r}. Update the pack or choose another file."
        )
    try:
        cfg = FlexIPConfig.from_dict(json.loads(header.metadata.get(CONFIG_KEY, "null")))
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error} Download or export it again.") from None
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in FlexIPNetwork(cfg).state_dict().items()}
    missing, extra = sorted(expected.keys() - header.shapes.keys()), sorted(header.shapes.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{name} does not hold the tensors that its config describes: {len(missing)} missing{_examples(missing)}, "
            f"{len(extra)} unknown{_examples(extra)}. Download or export it again."
        )
    for key, shape in expected.items():
        if header.shapes[key] != shape:
            raise ValueError(
                f"{name}: tensor {key} has shape {list(header.shapes[key])}, its config needs {list(shape)}. Download or export it again."
            )
    return cfg


def _examples(keys: list[str]) -> str:
    return f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""
