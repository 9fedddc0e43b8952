"""f of a sample's gradient: the square (``power=2``) or the absolute value (``power=1``)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["add_sample", "add_samples", "power_function"]

# Fewer elements than this in one sample's gradient, and the calls cost more than the passes.
_MANY = 2**15


def power_function(power: int) -> Callable[..., Tensor]:
    """Return f, which takes ``out=`` as torch's functions do."""
    return torch.square if power == 2 else torch.abs


def add_sample(score: Tensor, grad: Tensor, power: int) -> None:
    """Add ``f(grad)`` to ``score`` in place; ``grad`` may be overwritten."""
    if power == 2:
        score.addcmul_(grad, grad)
    else:
        score.add_(grad.abs_())


def add_samples(score: Tensor, grads: Tensor, power: int) -> None:
    """Add ``sum_b f(grads[b])`` to ``score`` in place; ``grads`` may be overwritten."""
    if score.numel() >= _MANY:
        for grad in grads.unbind():
            add_sample(score, grad, power)
    else:
        score.add_(power_function(power)(grads, out=grads).sum(0))
