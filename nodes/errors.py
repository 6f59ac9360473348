"""Errors that say which node they come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def named(node: str) -> Iterator[None]:
    """Puts the node's name in front of a core error about the user's input."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from None
