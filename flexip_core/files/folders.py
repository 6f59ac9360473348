"""What lies in other people's folders besides their pictures: one rule for hidden and system files, one for masks beside pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

# of Windows, macOS and its archives, Linux, Synology and QNAP; hidden ones begin with a dot
_SYSTEM = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "__macosx",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
    "icon\r",
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
}
# FlexIP's own, and OneTrainer's (white = trained): the meaning is certain. In others, white may mean the background.
_MASKS = (".mask", "-masklabel")
_SOME_MASK = re.compile(r"(.+?)(?:[._ -]mask(?:label)?)", re.IGNORECASE | re.DOTALL)


def is_system(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system or a tool, so that it is not the user's data."""
    return name.startswith(".") or name.lower() in _SYSTEM


def any_system(path: str) -> bool:
    """Whether any part of a relative path is a system's."""
    return any(is_system(part) for part in re.split(r"[/\\]", path))


@dataclass(frozen=True)
class Masks:
    """Of one folder: file -> its mask, and the files that are masks of another one but of uncertain meaning."""

    of: dict[str, str]
    left_out: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return name in self.left_out or name in self.of.values()


def masks(names: Iterable[str], pictures: tuple[str, ...], also: tuple[str, ...] = ()) -> Masks:
    """Which of the files of one folder are masks of others there: `pictures` and `also` (of clips) are endings in lower case.

    A picture is a mask if its name without ending is that of another one plus `.mask`, `-masklabel`, `_mask`, `-mask` or the like,
    in any letter case. Without that other one it is a picture, but `.mask` is always a mask.
    """
    parts = {name: os.path.splitext(name) for name in names}
    shown = {name: stem for name, (stem, ending) in parts.items() if ending.lower() in (*pictures, *also)}
    stems = set(shown.values())
    sure: dict[str, dict[str, str]] = {ending: {} for ending in _MASKS}
    left_out = []
    for name, stem in sorted(shown.items()):
        match = _SOME_MASK.fullmatch(stem)
        if match is None or parts[name][1].lower() not in pictures:
            continue
        ending = stem[len(match[1]) :].lower()
        if match[1] in stems and ending in sure and match[1] not in sure[ending]:
            sure[ending][match[1]] = name
        elif match[1] in stems or ending == ".mask":
            left_out.append(name)
    found: dict[str, str] = {}
    for ending in reversed(_MASKS):
        found |= sure[ending]
    second = [name for ending in _MASKS for name in sure[ending].values() if name not in found.values()]
    taken = {*found.values(), *left_out, *second}
    of = {name: found[stem] for name, stem in shown.items() if stem in found and name not in taken}
    return Masks(of, tuple(sorted({*left_out, *second, *(set(found.values()) - set(of.values()))})))
