"""Dataclasses out of JSON and TOML, strictly: whatever does not fit is one sentence that names the setting.

Known types of fields: int, Count, float, bool, str, Range, tuple[str, ...], dict[str, any of these or Any], other dataclasses,
and any of them with `| None`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, TypeVar

Count = Annotated[int, "at least 1"]
Range = tuple[float, float]
"""Written as one number or as [low, high]."""
_WORDS = {int: "a whole number", str: "text", bool: "true or false"}
_T = TypeVar("_T")


def build(cls: type[_T], data: Any, where: str) -> _T:
    """The dataclass `cls`. ValueError for unknown and missing settings and wrong types; `where` is what they belong to, or ""."""
    prefix = f"{where}." if where else ""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a TypeVar cannot ask for a dataclass
    if unknown := sorted(set(table(data, where or "a config")) - set(fields)):
        raise ValueError(f"unknown setting {prefix}{unknown[0]}; {where or 'a config'} has {', '.join(fields)}.")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in data]:
        raise ValueError(f"the setting {prefix}{missing[0]} is missing; add it.")
    hints = typing.get_type_hints(cls, include_extras=True)
    return cls(**{name: _value(hints[name], value, prefix + name) for name, value in data.items()})


def table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, "a table", value)
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):
        kinds = typing.get_args(hint)
        return value if isinstance(value, tuple(map(_plain_type, kinds))) else _value(kinds[0], value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if hint == Range:
        pair = value if isinstance(value, (list, tuple)) else [value, value]
        if len(pair) != 2 or not all(map(is_number, pair)):
            raise _wrong(where, "a number or a pair of numbers", value)
        return float(pair[0]), float(pair[1])
    if hint == tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise _wrong(where, "a list of texts", value)
        return tuple(value)
    if typing.get_origin(hint) is dict:
        kind = typing.get_args(hint)[1]
        return {k: v if kind is Any else _value(kind, v, f"{where}.{k}") for k, v in table(value, where).items()}
    if hint is float:
        if not is_number(value):
            raise _wrong(where, "a number", value)
        return float(value)
    if hint == Count:
        if type(value) is not int or value < 1:
            raise _wrong(where, "a whole number of at least 1", value)
        return value
    if type(value) is not hint:
        raise _wrong(where, _WORDS[hint], value)
    return value


def _plain_type(hint: Any) -> type:
    return typing.get_origin(hint) or hint


def _wrong(where: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{where} must be {expected}, got {repr(value)[:80]}.")


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
