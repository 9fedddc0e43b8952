"""What a layer keeps of its input for the masked gradient: the columns with masked entries, or all.

A Fisher mask has its entries in few rows and columns. So a linear layer needs few columns of its
input in backward, and a copy of these is smaller than the input. It saves memory only where nobody
else keeps the whole input: neither the activation that computed it nor another masked layer that
takes the same one, as queries, keys and values do. The latter is learned from the calls: in its
first pass a layer keeps its whole input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fishfast.training.gradient.chunks import Plan
from fishfast.training.gradient.costs import FEW, occurring
from fishfast.training.values.target import Target

__all__ = ["Columns", "kept_columns"]


def _nothing() -> None:
    """Stand in for a weak reference to nothing."""


# Weak references to the input and the target of the last call of a masked linear layer.
_last: tuple[Callable[[], Any], Callable[[], Any]] = (_nothing, _nothing)


@dataclass(frozen=True)
class Columns:
    """The masked gradient of a linear layer, from some columns of its input.

    It is that of a narrower layer, which has these inputs only.

    Attributes:
        plan: of the whole layer, for which this was made.
        columns: int64, the kept columns of the input; None: all have masked entries, or nearly.
        entries: int [k], flat indices of the masked entries in the narrower weight.
        shape: of the narrower weight.
    """

    plan: Plan
    columns: Tensor | None
    entries: Tensor
    shape: tuple[int, ...]

    @staticmethod
    def of(target: Target, axis: int) -> Columns:
        """Find the columns of a layer's input that have masked entries.

        Args:
            target: of a matrix.
            axis: of the weight along which the inputs are: 1, or 0 for GPT-2's layer.

        Returns:
            The columns, or all.
        """
        plan, shape, indices = target.plan, tuple(target.shape), target.indices
        flat = indices.long()
        place = [flat // shape[1], flat % shape[1]]
        occurs = occurring(place[axis], shape[axis])
        columns = occurs.nonzero().flatten()
        compacted = (plan.rows, plan.columns)[axis]
        few = len(columns) <= FEW * shape[axis]
        if not few or (plan.chunks and compacted is None):
            return Columns(plan, None, indices, shape)
        place[axis] = (occurs.cumsum(0) - 1)[place[axis]]
        narrow = (shape[0], len(columns)) if axis else (len(columns), shape[1])
        entries = (place[0] * narrow[1] + place[1]).to(indices.dtype)
        return Columns(plan, columns, entries, narrow)


def kept_columns(
    target: Target, x: Tensor, axis: int
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """Return what a call of a layer keeps of its input.

    Args:
        target: of the layer's weight, which has a plan.
        x: the input.
        axis: of the weight along which the inputs are.

    Returns:
        A copy of some columns of x, differentiable in it, with the masked entries and the shape of
        the narrower weight; None twice and the weight's shape where x itself is kept.
    """
    if _is_shared(target, x) is not False or _is_kept(x):
        return None, None, tuple(target.shape)
    found = target.columns
    if found is None or found.plan is not target.plan:
        found = target.columns = Columns.of(target, axis)
    if found.columns is None:
        return None, None, tuple(target.shape)
    return x.index_select(-1, found.columns), found.entries, found.shape


def _is_shared(target: Target, x: Tensor) -> bool | None:
    """Return whether another layer takes the same input too; None: not known yet."""
    global _last
    last_x, last_target = _last[0](), _last[1]()
    if last_x is x:
        target.shares_input = True
        if last_target is not None:
            last_target.shares_input = True
    elif last_target is not None and last_target.shares_input is None:
        last_target.shares_input = False
    _last = (weakref.ref(x), weakref.ref(target))
    return target.shares_input


def _is_kept(x: Tensor) -> bool:
    """Return whether what computed x keeps it for its own backward, or x is the model's input."""
    return x.is_leaf or hasattr(x.grad_fn, "_saved_result")  # such as ReLU, softmax and tanh
