"""What a rule is: how one function uses its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.uses import Use

__all__ = ["Rule"]


class Rule(ABC):
    """One call of a function with an input and up to two operands (weight and bias).

    Attributes:
        x: the input.
        operands: the call's weight and bias; None where it has none.
        options: the other arguments by name.
        meets_data: whether the call has another tensor with a gradient: if not, its result may be
            caught where it meets the data.
        sees_data: whether the input may come from the batch, so that its rows may be samples.
    """

    # The function's argument names in order, by which positional arguments are found.
    arguments: tuple[str, ...] = ()
    # Whether autocast runs the function in its lower precision.
    in_low_precision = False
    # Whether the input must be data: where it comes from parameters alone, both make an operand.
    only_data = False
    # Whether `x` is kept after the call, apart from what autograd saves.
    keeps_input = False
    meets_data = False
    sees_data = True

    def __init__(self, func: Callable[..., Any], call: dict[str, Any]) -> None:
        self.func = func
        self.x: Any = call.pop("input")
        self.operands: tuple[Tensor | None, ...] = (
            call.pop("weight", None),
            call.pop("bias", None),
        )
        self.options = call

    @classmethod
    def bind(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Rule | None:
        """Return the rule for a call, or None if it is not exact for it."""
        call = dict(zip(cls.arguments, args, strict=False))
        call.update(kwargs)
        # Settings as they are now: a list is the model's own, which it may change.
        call = {name: tuple(v) if isinstance(v, list) else v for name, v in call.items()}
        x = call.get("input")
        if not isinstance(x, Tensor) or x.is_complex():
            return None
        rule = cls(func, call)
        return rule if rule.is_exact() else None

    @classmethod
    def weight_of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the weight among the arguments of a call."""
        if "weight" in kwargs:
            return kwargs["weight"]
        place = cls.arguments.index("weight")
        return args[place] if place < len(args) else None

    @abstractmethod
    def is_exact(self) -> bool:
        """Return whether shapes and options are those that the rule covers."""

    @abstractmethod
    def num_lead(self, x: Tensor) -> int:
        """Return how many leading dims of the input and the output count rows."""

    def forward(self, x: Any, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        return self.func(x, weight=weight, bias=bias, **self.options)

    @abstractmethod
    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return the gradient of the input."""

    @abstractmethod
    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return the use of operand ``index``."""

    def add_to(
        self, scores: Sequence[Tensor | None], x: Tensor, grad: Tensor, rows: Rows, add: Accumulator
    ) -> None:
        """Add the f's of all samples to the scores of weight and bias, None where there is none."""
        for index, score in enumerate(scores):
            if score is not None:
                self.use(index, x, grad, rows).add_to(score, add)

    def shape(self, index: int) -> torch.Size:
        """Return the shape of operand ``index``."""
        operand = self.operands[index]
        assert operand is not None
        return operand.shape


def autocast_input(x: Tensor) -> Tensor:
    """Return what autocast gives a matrix product: saved for the backward in half the memory."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x
