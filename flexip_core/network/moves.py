"""Where the rows of a batch go in somebody else's code that repeats, reorders or drops them (Attention Couple does).

Comparing the numbers before and after would not tell: rows of a sweep start from the same noise, and so do positive and negative,
but their gates and references differ. So the rows' numbers go through the same operations as the rows themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NO_ROW, MIXED = -1, -2  # in place of a row's number
# operations that put numbers elsewhere and compute nothing
MOVES = frozenset(
    "alias as_strided cat clone copy_ detach expand flip gather index index_copy index_copy_ index_put index_put_ index_select "
    "lift_fresh permute repeat roll select slice split split_with_sizes squeeze stack t transpose unbind unfold unsafe_split "
    "unsqueeze view where _index_put_impl_ _reshape_alias _to_copy _unsafe_view".split()
)
NEW = frozenset(
    "empty empty_like empty_strided full full_like new_empty new_empty_strided new_full new_ones new_zeros ones ones_like "
    "zeros zeros_like".split()
)


class _Following(TorchDispatchMode):
    """Runs every operation on tensors that are followed once more, on the numbers of their rows.

    What is computed from a tensor and has its shape keeps its rows; whatever else comes out is not followed.
    """

    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.rows = rows
        # tensors with the numbers of the rows that they came from, in the same shape; held because ids find them
        self._followed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def numbers(self, tensor: Any) -> torch.Tensor | None:
        if tensor is self.rows and id(tensor) not in self._followed:  # only where somebody uses them
            numbers = torch.arange(len(tensor), dtype=torch.int16, device=tensor.device)
            numbers = numbers.view(-1, *[1] * (tensor.dim() - 1))
            self._follow(tensor, torch.empty_like(tensor, dtype=torch.int16).copy_(numbers))
        return self._followed.get(id(tensor), (None, None))[1]

    def _follow(self, tensor: torch.Tensor, numbers: torch.Tensor) -> None:
        self._followed[id(tensor)] = tensor, numbers

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if self.numbers(t) is not None]
        if inputs:
            with self:  # without autograd, some operations come undivided
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        if name in NEW:
            self._follow(result, _no_rows(result))
        elif inputs and name in MOVES:
            self._move(function, args, kwargs, result)
        elif inputs:
            self._compute(inputs, result)
        return result

    def _move(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        def numbers(leaf: Any) -> Any:
            if (known := self.numbers(leaf)) is not None:
                return known
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                return _no_rows(leaf)
            return None if isinstance(leaf, torch.dtype) else leaf

        moved = function(*tree_map(numbers, args), **tree_map(numbers, kwargs))
        for tensor, one in zip(tree_leaves(result), tree_leaves(moved)):
            self._follow(tensor, one)

    def _compute(self, inputs: list[torch.Tensor], result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self.numbers(tensor) is None:
                numbers = [known for t in inputs if t.shape == tensor.shape and (known := self.numbers(t)) is not None]
                if numbers:
                    self._follow(tensor, functools.reduce(_merged, numbers[1:], numbers[0].clone()))


def _no_rows(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, NO_ROW, dtype=torch.int16)


def _merged(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The numbers of what is computed from a and b, place by place."""
    return torch.where((a == b) | (b == NO_ROW), a, torch.where(a == NO_ROW, b, MIXED))


def followed(call: Callable[[], tuple], rows: torch.Tensor) -> tuple[tuple, tuple[int, ...] | None]:
    """`call()`, and for each row of the first of its results which row of `rows` it came from; None where that cannot be told.

    The numbers are read on the host, unless the result is `rows` itself.
    """
    mode = _Following(rows)
    with mode:
        result = call()
    if result[0] is rows:
        return result, tuple(range(len(rows)))
    numbers = mode.numbers(result[0])
    if numbers is None:
        return result, None
    flat = numbers.flatten(1)
    found = torch.where((flat == flat[:, :1]).all(dim=1), flat[:, 0], MIXED).tolist()
    return result, None if min(found, default=0) < 0 else tuple(found)
