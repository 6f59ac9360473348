"""The pairs that a loop trains on: out of folders and shards, or out of what a cache has kept of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .cached import CachedSource
from .dataset import DataSet, part_of
from .entries import Entries
from .folders import FolderPairs


def make_source(
    data: str | os.PathLike | DataSet,
    size: int,
    cache: str | os.PathLike | Entries | None = None,
    identity: Mapping[str, str] | None = None,
    part: str = "train",
    **options: Any,
) -> FolderPairs | CachedSource:
    """The PairSource over a folder of pictures or of shards (or a part of it that is scanned already), or the CachedSource over what `cache.fill` has kept of it.

    `options` are FolderPairs' or, with a `cache` folder, CachedSource's; `identity` as for `cache.fill`.
    """
    found = part_of(data, part)
    if cache is None:
        return FolderPairs(found, size, **options)
    return CachedSource(found, size, cache, identity or {}, **options)
