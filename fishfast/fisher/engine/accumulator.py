"""Where per-sample gradients become scores: f, and the backend that runs the sums."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fishfast import _backend
from fishfast.fisher.engine import accumulate, accumulate_cpu

__all__ = ["Accumulator"]


class Accumulator:
    """Adds f of per-sample gradients to scores, in place.

    Args:
        power: 2 for squares, 1 for absolute values.
        backend: "auto", "cpu", "triton" or "torch".
    """

    def __init__(self, power: int, backend: str = "auto") -> None:
        self.power, self.backend = power, backend
        self._functions: dict[tuple[str, torch.device], Callable[..., None]] = {}

    def f(self, values: Tensor) -> Tensor:
        """Return the square or the absolute value."""
        return values.square() if self.power == 2 else values.abs()

    def add_samples(self, score: Tensor, grads: Tensor) -> None:
        """Add ``sum_b f(grads[b])``."""
        score += self.f(grads).sum(0)

    def _backend_of(self, score: Tensor, operation: str) -> Callable[..., None]:
        """Return the function that runs an operation where the score is."""
        found = self._functions.get((operation, score.device))
        if found is None:
            found = self._functions[operation, score.device] = self._found(score, operation)
        return found

    def _found(self, score: Tensor, operation: str) -> Callable[..., None]:
        backend = _backend.choose("fisher", score.device, self.backend)
        if backend != "triton":
            module: Any = accumulate_cpu if backend == "cpu" else accumulate
            return getattr(module, f"add_{operation}")
        file = {"blocks": "linear"}.get(operation, operation)
        module = importlib.import_module(f"fishfast.kernels.fisher_{file}")
        return getattr(module, f"add_{operation}")

    def add_linear(
        self, score: Tensor, grad: Tensor, x: Tensor, starts: Tensor | None, ends: Tensor | None
    ) -> None:
        """Add ``sum_b f( sum_{r in b} grad[r, o] x[r, i] )`` to ``score [O, I]``."""
        self._backend_of(score, "linear")(score, grad, x, starts, ends, self.power)

    def add_blocks(
        self, score: Tensor, bias: Tensor | None, grad: Tensor, x: Tensor, bias_of_x: bool
    ) -> None:
        """Add the same for samples of one length, ``[B, T, *]``; f of their sums to ``bias``."""
        self._backend_of(score, "blocks")(score, bias, grad, x, bias_of_x, self.power)

    def add_sum(
        self,
        score: Tensor | None,
        grad: Tensor,
        x: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        bias: Tensor | None = None,
    ) -> None:
        """Add ``sum_b f( sum_t grad (x - mean) rstd )`` to ``score [D]``, without x to ``bias``."""
        if grad.dtype == torch.float64:
            x, mean, rstd = (None if t is None else t.float() for t in (x, mean, rstd))
            grad = grad.float()
        run = self._backend_of(grad, "sum")
        run(score, grad, x, mean, rstd, self.power, bias)

    def add_embedding(self, score: Tensor, tokens: Tensor, samples: Tensor, grad: Tensor) -> None:
        """Add the rows of equal tokens of a sample, f of their sum, to ``score [V, D]``."""
        self._backend_of(score, "embedding")(score, tokens, samples, _no_double(grad), self.power)

    def add_conv(
        self, score: Tensor, grad: Tensor, x: Tensor, stride: tuple[int, ...],
        padding: tuple[int, ...], dilation: tuple[int, ...], groups: int,
    ) -> None:  # fmt: skip
        """Add f of each sample's weight gradient to ``score [O, C / groups, kh, kw]``."""
        self._backend_of(score, "conv")(
            score, grad, x, stride, padding, dilation, groups, self.power
        )


def _no_double(values: Tensor) -> Tensor:
    """Return fp64 values in fp32, in which scores are added; others as they are."""
    return values.float() if values.dtype == torch.float64 else values
