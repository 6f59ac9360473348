"""Lists that artists type: what separates their parts, and which blocks a name in them stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable

SEPARATORS = ",;，；、\n"


def split_list(text: str) -> list[str]:
    """ "cat, red hat" -> ["cat", "red hat"]: the parts between SEPARATORS, without empty ones."""
    return [part.strip() for part in re.split(f"[{SEPARATORS}]", text) if part.strip()]


def blocks_under(name: str, addresses: Iterable[str]) -> list[str]:
    """The block addresses that begin with a name, part by part: "input.4" means "input.4.0", not "input.40.0"."""
    return [address for address in addresses if f"{address}.".startswith(f"{name}.")]
