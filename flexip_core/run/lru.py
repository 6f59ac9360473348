"""A cache of the most recently used values: layouts of UNet calls, which come in turns with areas, context windows and tiles."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

ROOM = 512 * 2**20  # bytes
ENTRY = 4096  # bytes that a value and its key take at least


class Lru:
    """Values by key, the most recently used: at least `least` of them, more while they fit into ROOM bytes."""

    def __init__(self, least: int):
        self.least, self.bytes = least, 0
        self._values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Any) -> Any:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def make_room(self, key: Any) -> None:
        """Called before the value of `key` is made, so that there is never one too many."""
        while key not in self._values and len(self._values) >= self.least and self.bytes > ROOM:
            _, (_, size) = self._values.popitem(last=False)
            self.bytes -= size

    def put(self, key: Any, value: Any, size: int) -> None:
        size, (_, before) = max(size, ENTRY), self._values.pop(key, (None, 0))
        self.bytes += size - before
        self._values[key] = value, size
