"""Convolutions with stride, padding, dilation and groups, in one to three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.rules.rule import Rule
from fishfast.fisher.engine.uses import SumUse, Use
from fishfast.fisher.engine.uses_conv import ConvUse, Window

__all__ = ["ConvRule"]


class ConvRule(Rule):
    """``F.conv1d``, ``F.conv2d``, ``F.conv3d`` with zero padding.

    Other padding modes pad before they call these; ``"same"`` is asymmetric for even kernels, and
    then the call is run on an input that was padded by hand.
    """

    arguments: tuple[str, ...] = (
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "dilation",
        "groups",
    )
    in_low_precision = True

    def is_exact(self) -> bool:
        """Return whether the input has a batch dim."""
        weight = self.operands[0]
        return weight is not None and self.x.dim() == weight.dim()

    def num_lead(self, x: Tensor) -> int:
        """Return one: the images."""
        return 1

    def _window(self) -> Window:
        padding = self.options.get("padding", 0)
        return Window(
            self._sizes(self.options.get("stride", 1)),
            self._sizes(0 if isinstance(padding, str) else padding),  # "same" is padded by hand
            self._sizes(self.options.get("dilation", 1)),
            self.options.get("groups", 1),
        )

    def _sizes(self, value: Any) -> tuple[int, ...]:
        """Return an option as one number for each dim."""
        dims = len(self.shape(0)) - 2
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return value * dims if len(value) == 1 else value

    def _same_padding(self) -> list[int]:
        """Return what ``F.pad`` adds for ``padding="same"``, the last dim first."""
        if self.options.get("padding") != "same":
            return []
        amounts = []
        sizes = self.shape(0)[2:]
        for size, dilation in zip(reversed(sizes), reversed(self._window().dilation), strict=True):
            total = dilation * (size - 1)
            amounts += [total // 2, total - total // 2]
        return amounts

    def _padded(self, x: Tensor) -> Tensor:
        amounts = self._same_padding()
        return F.pad(x, amounts) if amounts else x

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return the transposed convolution of G."""
        assert weight is not None
        window, padded = self._window(), self._padded(x)
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, padded.to(grad.dtype), weight.to(grad.dtype), None,
            window.stride, window.padding, window.dilation,
            False, [0] * (x.dim() - 2), window.groups, [True, False, False],
        )  # fmt: skip
        for dim, before in enumerate(self._same_padding()[::2], start=1):
            grad_x = grad_x.narrow(-dim, before, x.shape[-dim])
        return grad_x

    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return G against the windows of the input, or the sum of G for the bias."""
        if index == 1:
            return SumUse(rows, grad.flatten(2).transpose(1, 2), self.shape(1))
        return ConvUse(rows, grad, self._padded(x), self.shape(0), self._window())


CONV_RULES: dict[Callable[..., Any], type[Rule]] = {
    F.conv1d: ConvRule,
    F.conv2d: ConvRule,
    F.conv3d: ConvRule,
}
