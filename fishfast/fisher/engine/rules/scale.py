"""A vector of parameters that scales the features of the data: norms that a model writes itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.rules.rule import Rule
from fishfast.fisher.engine.uses import SumUse, Use

__all__ = ["ScaleRule"]


class ScaleRule(Rule):
    """``weight * x`` or ``x * weight`` with a parameter ``[D]`` and data ``[*rows, D]``."""

    only_data = True

    @classmethod
    def weight_of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the factor that is a parameter."""
        return next((value for value in args if type(value) is nn.Parameter), None)

    @classmethod
    def bind(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Rule | None:
        """Return the rule for a product of a parameter and data that has a gradient."""
        if kwargs or len(args) != 2:
            return None
        weight = cls.weight_of(args, kwargs)
        x = args[1] if weight is args[0] else args[0]
        if weight is None or type(x) is not Tensor or not x.requires_grad or x.is_complex():
            return None
        rule = cls(func, {"input": x, "weight": weight})
        return rule if rule.is_exact() else None

    def is_exact(self) -> bool:
        """Return whether the parameter is a vector, and the result has the data's shape."""
        (weight, _), x = self.operands, self.x
        return (
            weight is not None
            and weight.dim() == 1
            and x.dim() >= 2
            and x.shape[-1] == weight.shape[0]
        )

    def num_lead(self, x: Tensor) -> int:
        """Return all dims but the features."""
        return x.dim() - 1

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        assert weight is not None
        return torch.mul(x, weight)

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return ``G weight``."""
        assert weight is not None
        return (grad * weight).to(x.dtype)

    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return ``sum_t G x``."""
        return SumUse(rows, grad, self.shape(0), (x, None, None))

    def add_to(
        self, scores: Sequence[Tensor | None], x: Tensor, grad: Tensor, rows: Rows, add: Accumulator
    ) -> None:
        """Add the scores."""
        (weight, _) = scores
        if weight is None or rows.layout is None:
            super().add_to(scores, x, grad, rows, add)
        else:
            add.add_sum(weight, rows.blocks(grad), rows.blocks(x), None, None)


SCALE_RULES: dict[Callable[..., Any], type[Rule]] = {
    torch.mul: ScaleRule,
    Tensor.mul: ScaleRule,
    Tensor.__mul__: ScaleRule,
    Tensor.__rmul__: ScaleRule,
}
