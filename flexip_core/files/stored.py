"""How one set of tensors may be stored: as several parts beside each other, or as float8 numbers with a scale beside each weight."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<all>\d{5})(?P<ending>\.\w+)")  # transformers' and diffusers'
# Of a layer X with X.weight. Sources: comfy/utils.py, convert_old_quants (scale_weight, scale_input, scaled_fp8), and
# comfy/quant_ops.py (weight_scale, input_scale, comfy_quant).
_SCALES = (".scale_weight", ".weight_scale")
_ASIDE = (".scale_input", ".input_scale", ".comfy_quant")
_MARK = "scaled_fp8"
_FLOAT8 = {"float8_e4m3fn", "float8_e5m2"}
_PLAIN = {"float64", "float32", "float16", "bfloat16"}


def parts_of(path: Path) -> list[Path]:
    """All parts of the set that `path` is one of, in their order; [path] for a file that is whole. ValueError if some are missing.

    No index is needed: the names tell the parts, and each part tells its tensors.
    """
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["all"]) <= 1000:
        return [path]
    parts = [
        path.with_name(f"{match['name']}-{number:05}-of-{match['all']}{match['ending']}")
        for number in range(1, int(match["all"]) + 1)
    ]
    missing = [part.name for part in parts if not part.exists()]
    if missing and path.name not in missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"is part {int(match['number'])} of {len(parts)} of a model, and {missing[0]}{more} does not lie beside it; "
            "download all parts into the same folder, or the model as a single file"
        )
    return parts


def first_parts(names: list[str]) -> list[str]:
    """Of each set of parts, only the first one that is there; all other names as they are."""
    found: dict[str, str] = {}
    for name in names:
        match = _PART.fullmatch(name)
        found.setdefault(f"{match['name']} of {match['all']}{match['ending']}" if match else name, name)
    return list(found.values())


def scales(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> dict[str, str]:
    """Key of a float8 weight -> key of its scale: one number, or one for each row. Other quantisations are left alone."""
    found = {}
    for key in shapes:
        for ending in _SCALES:
            weight = key.removesuffix(ending) + ".weight"
            if not key.endswith(ending) or dtypes.get(weight) not in _FLOAT8 or dtypes[key] not in _PLAIN:
                continue
            rows = shapes[weight][:1]
            if math.prod(shapes[key]) == 1 or shapes[key] in (rows, (*rows, 1)):
                found[weight] = key
    return found


def aside(keys: Mapping[str, object], scaled: Mapping[str, str]) -> set[str]:
    """Keys that only tell how `scaled` weights are stored."""
    if not scaled:
        return set()
    layers = {weight.removesuffix(".weight") for weight in scaled}
    found = {layer + ending for layer in layers for ending in _ASIDE} | set(scaled.values())
    return {key for key in keys if key in found or key.rpartition(".")[2] == _MARK}


def multiplied(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float8 (rows, ...) * scale () or (rows,) or (rows, 1) -> float32, with nothing lost"""
    scale = scale.float()
    return weight.float() * (scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *[1] * (weight.ndim - 1)))


def quantised(key: str) -> bool:
    """Whether a tensor has the name of a scale or a mark of quantised weights."""
    return key.endswith((*_SCALES, *_ASIDE, ".weight_scale_2", ".weight_scale_inv", ".pre_quant_scale", _MARK))
