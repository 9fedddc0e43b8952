"""Matrix products with a weight: linear layers, addmm (GPT-2), matmul, and stacks of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.rules.rule import Rule
from fishfast.fisher.engine.uses import ExpertsUse, LinearUse, SumUse, Use

__all__ = ["AddmmRule", "GroupedRule", "LinearRule", "MatmulRule"]


class LinearRule(Rule):
    """``F.linear(input, weight, bias)``: ``x W^T + b`` with any middle dimensions."""

    arguments: tuple[str, ...] = ("input", "weight", "bias")
    in_low_precision = True
    transposed = False  # weights are [O, I]

    def is_exact(self) -> bool:
        """Return whether the weight is a matrix and the bias is not broadcast."""
        weight, bias = self.operands
        if weight is None or weight.dim() != 2 or self.x.dim() < 2 or self.options:
            return False
        width = weight.shape[1 if self.transposed else 0]
        return bias is None or bias.shape == (width,)

    def num_lead(self, x: Tensor) -> int:
        """Return all dims but the features."""
        return x.dim() - 1

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        return self.func(x, weight, bias)

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return ``G W``, or ``G W^T`` for a transposed weight."""
        assert weight is not None
        return grad @ (weight.T if self.transposed else weight).to(grad.dtype)

    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return ``sum_t G A^T`` for the weight, ``sum_t G`` for the bias."""
        if index == 1:
            return SumUse(rows, grad, self.shape(1))
        dense = x if x.layout is torch.strided else x.to_dense()
        return LinearUse(rows, grad, dense, self.transposed)

    def add_to(
        self, scores: Sequence[Tensor | None], x: Tensor, grad: Tensor, rows: Rows, add: Accumulator
    ) -> None:
        """Add both in one launch where the rows have an order."""
        weight, bias = scores
        x = x if x.layout is torch.strided else x.to_dense()
        alike = grad.dtype is x.dtype and grad.dtype is not torch.float64
        alike = alike and x.layout is torch.strided
        if weight is None or rows.layout is None or not alike:
            super().add_to(scores, x, grad, rows, add)
            return
        grad, x = rows.blocks(grad), rows.blocks(x)
        left, right = (x, grad) if self.transposed else (grad, x)
        add.add_blocks(weight, bias, left, right, self.transposed)


class MatmulRule(LinearRule):
    """``input @ weight`` with a weight ``[I, O]``."""

    arguments: tuple[str, ...] = ("input", "weight")
    transposed = True

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        assert weight is not None
        return torch.matmul(x, weight)


class AddmmRule(LinearRule):
    """``torch.addmm(bias, input, weight)``: GPT-2's Conv1D."""

    arguments: tuple[str, ...] = ("bias", "input", "weight")
    transposed = True

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        assert weight is not None
        assert bias is not None
        return torch.addmm(bias, x, weight)


class GroupedRule(Rule):
    """``F.grouped_mm(input, weights [E, I, O], offs=ends)``: each expert has its own rows."""

    arguments: tuple[str, ...] = ("input", "weight")

    def is_exact(self) -> bool:
        """Return whether rows are packed expert by expert, without a bias."""
        weight, bias = self.operands
        two_by_three = weight is not None and weight.dim() == 3 and self.x.dim() == 2
        return two_by_three and bias is None and self.options.get("offs") is not None

    def num_lead(self, x: Tensor) -> int:
        """Return one: the tokens."""
        return 1

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        return self.func(x, weight, **self.options)

    def _parts(self) -> list[slice]:
        ends = self.options["offs"].tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return each expert's ``G W^T``; rows of no expert have none."""
        assert weight is not None
        grad_x = torch.zeros_like(x)
        for places, own in zip(self._parts(), weight, strict=True):
            grad_x[places] = (grad[places] @ own.T.to(grad.dtype)).to(x.dtype)
        return grad_x

    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return each expert's ``sum_t A G^T``."""
        parts = [(places, grad[places], x[places]) for places in self._parts()]
        return ExpertsUse(rows, parts, self.shape(0))


LINEAR_RULES: dict[Callable[..., Any], type[Rule]] = {
    F.linear: LinearRule,
    torch.addmm: AddmmRule,
    torch.Tensor.addmm: AddmmRule,
    torch.matmul: MatmulRule,
    torch.mm: MatmulRule,
    torch.Tensor.matmul: MatmulRule,
    torch.Tensor.mm: MatmulRule,
    torch.Tensor.__matmul__: MatmulRule,
}
for _name in ("grouped_mm", "_grouped_mm"):  # newer torch only
    for _module in (F, torch):
        if hasattr(_module, _name):
            LINEAR_RULES[getattr(_module, _name)] = GroupedRule
