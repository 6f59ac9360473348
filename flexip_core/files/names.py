"""Names of files that come from somebody else."""

from __future__ import annotations

import re

_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL)


def is_device(name: str) -> bool:
    """Whether a part of a path is what Windows keeps for a device, whatever ending it has: such a file cannot be made there."""
    return any(_DEVICE.fullmatch(part) for part in re.split(r"[/\\]", name))
