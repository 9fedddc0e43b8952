"""Parameters in elementwise calls: scales, shifts, class tokens, position tables.

Where such an operand meets the data it is expanded to the call's shape by an autograd function of
ours, whose backward sees one slice for every row. So one rule covers every elementwise call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.rules.rule import Rule
from fishfast.fisher.engine.uses import BroadcastUse, SumUse, Use

__all__ = ["BROADCASTING", "BroadcastRule"]


class BroadcastRule(Rule):
    """An operand expanded to ``shape``; rows are the dims that it is expanded along, from dim 0."""

    def __init__(self, operand: Tensor, shape: torch.Size) -> None:
        self.x: Any = None  # the operand is all that there is
        self.operands = (operand, None)
        self.expanded = shape
        self.lead = max(1, _num_broadcast(operand.shape, shape))

    def is_exact(self) -> bool:
        """Return whether there is a dim that can be the sample."""
        return len(self.expanded) >= 1

    def num_lead(self, x: Tensor) -> int:
        """Return the leading dims that the operand is expanded along, at least one."""
        return self.lead

    def forward(self, x: Any, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Expand the operand: to its own memory, which calls that get it only read."""
        assert weight is not None
        return weight.expand(self.expanded).data

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """A broadcast has no input."""
        raise AssertionError("a broadcast has no input")

    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return the sum over the dims that the operand was expanded along."""
        shape = self.shape(0)
        own_rows = _num_broadcast(shape, self.expanded) == 0
        vector = len(shape) > 0 and shape.numel() == shape[-1]
        if not own_rows and vector and grad.shape[self.lead :] == shape[-1:]:
            return SumUse(rows, grad, shape)
        return BroadcastUse(rows, grad, shape, own_rows)


def _num_broadcast(shape: torch.Size, expanded: torch.Size) -> int:
    """Return how many dims, from dim 0 on, are new or of size 1 in ``shape`` only."""
    missing = len(expanded) - len(shape)
    count = 0
    for dim, size in enumerate(expanded):
        own = shape[dim - missing] if dim >= missing else 1
        if own != 1 or (size == 1 and dim >= missing):
            break
        count += 1
    return count


_NAMES = (
    "add", "sub", "mul", "div", "true_divide", "where", "maximum", "minimum", "pow", "addcmul",
    "addcdiv", "lerp", "atan2", "hypot", "fmax", "fmin",
    "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__",
    "__imul__", "__truediv__", "__rtruediv__", "__itruediv__", "__rdiv__", "__pow__", "__rpow__",
    "add_", "sub_", "mul_", "div_", "rsub",
    "expand", "expand_as", "broadcast_to",
)  # fmt: skip

# Calls whose tensor arguments are broadcast against each other, element by element.
BROADCASTING: set[Callable[..., Any]] = {
    getattr(module, name)
    for name in _NAMES
    for module in (torch, torch.Tensor)
    if hasattr(module, name)
}
