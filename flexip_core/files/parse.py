"""JSON and TOML that anybody may have written: whatever is wrong with a text, it raises one ValueError."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LARGEST_INT = 2**64 - 1  # a seed; anything larger overflows wherever it is used


class Unreadable(ValueError):
    """Half a sentence."""


def parse_json(text: str | bytes) -> Any:
    """Unreadable, half a sentence, for text that is not JSON, is nested too deeply, or holds numbers beyond 64 bits."""
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise Unreadable("it is not text in UTF-8") from None
    except ValueError as error:
        raise Unreadable(str(error)) from None


def read_json(path: Path, most: int = 2**28) -> Any:
    """As `parse_json`, from a file of at most `most` bytes. OSError where it cannot be read."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Unreadable(f"it is longer than {most} bytes")
    return parse_json(data)


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """`name` begins the sentence about text that is not TOML, is nested too deeply, or holds numbers beyond 64 bits."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        data = tomllib.loads(text)
        _check_ints(data)
        return data
    except RecursionError:
        raise ValueError(f"{name} is not a TOML file: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{name} is not a TOML file: {error}.") from None


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(number := int(digits)) > LARGEST_INT:
        raise ValueError(f"{digits[:20]}... is too large a number")
    return number


def _check_ints(value: Any) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ValueError(f"{str(value)[:20]}... is too large a number")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_ints(inner)
