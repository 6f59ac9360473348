"""What other nodes' patches do to the rows of a batch between the model call and a block's text attention.

Attention Couple, in several packs, repeats the rows of a prompt per region (`attn2_patch`) and merges them afterwards
(`attn2_output_patch`). Every row in between is to get what belongs to the row that it came from.
"""

from __future__ import annotations

from typing import Any

import torch

from ..flexip_core.network.moves import followed as follow
from ..flexip_core.run.chain import Call, Row
from ..flexip_core.run.run import Run

ROWS = "flexip_rows"  # in a block's options: which rows of the call its rows came from, where they moved


def followed(options: dict[str, Any], key: str, run: Run, call: Call, sigma: float | None) -> dict[str, Any]:
    """The options of a UNet call, with one patch in place of others' in attn2_patch where there are any: it runs them and, where
    they move rows, puts what FlexIP adds to the moved rows under `key`."""
    patches = options.get("patches", {}).get("attn2_patch")
    if not patches:
        return options
    patch = torch.compiler.disable(_Followed(tuple(patches), key, run, call, sigma))
    return {**options, "patches": {**options["patches"], "attn2_patch": [patch]}}


def moved_rows(rows: tuple[Row, ...], options: dict[str, Any]) -> tuple[Row, ...]:
    """The rows of a block, from those of the call."""
    return tuple(rows[row] for row in options[ROWS]) if ROWS in options else rows


class _Followed:
    """All patches of attn2_patch, in turn. Where they put the rows depends on the block and the shape of the call and not on the
    step, so it is found out once per run: reading it makes the host wait."""

    def __init__(self, patches: tuple[Any, ...], key: str, run: Run, call: Call, sigma: float | None):
        self.patches, self.key, self.run, self.call, self.sigma = patches, key, run, call, sigma

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        def theirs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            state = q, k, v
            for patch in self.patches:
                state = patch(*state, options)
            return state

        moves = self.run.moves
        chunks = tuple(options.get("cond_or_uncond", ()))  # some patches write into the list
        layout = *map(id, self.patches), options.get("block"), options.get("block_index"), chunks, q.shape
        if layout in moves:
            result, rows = theirs(), moves[layout][1]
        else:
            result, rows = follow(theirs, q)
            if rows is None and len(result[0]) == len(q):
                rows = tuple(range(len(q)))  # computed anew, as far as can be seen each row from itself
        if result[0] is q:
            return result
        if rows is None or len(rows) != len(result[0]):
            raise RuntimeError(
                f"FlexIP: {self._names()} makes {len(result[0])} rows of {len(q)} before a block's text attention, and FlexIP cannot "
                "tell which row came from which. Take that node or FlexIP off this model."
            )
        moves[layout] = self.patches, rows  # the patches, too, so that their ids stay theirs
        if rows != tuple(range(len(q))):
            options[ROWS] = rows
            options[self.key] = self.run.moved(self.call, rows, self.sigma)
        return result

    def _names(self) -> str:
        named = [getattr(patch, "__qualname__", type(patch).__name__) for patch in self.patches]
        return f"the patch {named[0]}" if len(named) == 1 else f"one of the patches {', '.join(named)}"
