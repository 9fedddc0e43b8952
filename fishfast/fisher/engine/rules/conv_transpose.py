"""Transposed convolutions in one to three dimensions: convolutions with G and input exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.rules.conv import ConvRule
from fishfast.fisher.engine.rules.rule import Rule
from fishfast.fisher.engine.uses import Use
from fishfast.fisher.engine.uses_conv import ConvUse

__all__ = ["CONV_TRANSPOSE_RULES", "ConvTransposeRule"]


class ConvTransposeRule(ConvRule):
    """``F.conv_transpose1d``, ``F.conv_transpose2d``, ``F.conv_transpose3d``.

    Its output's gradient, convolved with the weight ``[I, O / groups, *kernel]``, gives that of its
    input. So the weight's gradient is that of this convolution.
    """

    arguments: tuple[str, ...] = (
        "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation",
    )  # fmt: skip

    def _output_padding(self) -> tuple[int, ...]:
        return self._sizes(self.options.get("output_padding", 0))

    def is_exact(self) -> bool:
        """Return whether the convolution has as many positions as the input."""
        fits = super().is_exact() and not isinstance(self.options.get("padding"), str)
        pairs = zip(self._output_padding(), self._window().stride, strict=True) if fits else ()
        return fits and all(extra < stride for extra, stride in pairs)

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return the convolution of G."""
        assert weight is not None
        window = self._window()
        return torch.ops.aten.convolution_backward(
            grad, x.to(grad.dtype), weight.to(grad.dtype), None, window.stride, window.padding,
            window.dilation, True, self._output_padding(), window.groups, [True, False, False],
        )[0]  # fmt: skip

    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return the input against the windows of G, or the sum of G for the bias."""
        if index == 1:
            return super().use(index, x, grad, rows)
        return ConvUse(rows, x, grad, self.shape(0), self._window())


CONV_TRANSPOSE_RULES: dict[Callable[..., Any], type[Rule]] = {
    F.conv_transpose1d: ConvTransposeRule,
    F.conv_transpose2d: ConvTransposeRule,
    F.conv_transpose3d: ConvTransposeRule,
}
