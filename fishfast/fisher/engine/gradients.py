"""Gradients by autograd's engine, called as torch.autograd.grad calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["gradients"]


def gradients(
    output: Tensor, inputs: Sequence[Any], grad: Tensor | None = None, keep_graph: bool = True
) -> tuple[Tensor | None, ...]:
    """Return what torch.autograd.grad does, without leaving a torch function mode.

    The mode would take grad() itself for a function to handle and step aside while it runs, and a
    checkpointed layer, which runs again in there, would not be intercepted the second time.

    Args:
        output: what is differentiated.
        inputs: by what.
        grad: the gradient of ``output``; default: ones.
        keep_graph: whether the graph is used again.

    Returns:
        A gradient for each input; None where the output does not depend on it.
    """
    grad = torch.ones_like(output) if grad is None else grad
    with torch._C._EnableTorchFunction():
        return torch.autograd.Variable._execution_engine.run_backward(
            (output,), (grad,), keep_graph, False, tuple(inputs), True, accumulate_grad=False
        )
