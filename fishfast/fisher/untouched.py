"""Gives the model back as it was: modes and the parameters' hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

__all__ = ["hooks_set_aside", "scoring_mode"]


@contextlib.contextmanager
def scoring_mode(model: nn.Module, eval_mode: bool) -> Iterator[None]:
    """Eval mode while scoring; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and module.running_mean is None:
            raise ValueError(
                f"{name or 'the model'!r} must have running statistics; got a "
                f"{type(module).__name__} with track_running_stats=False, which mixes samples in "
                "every mode; replace it"
            )
        if module.training and not eval_mode and (batch_norm or _dropout(module) > 0):
            raise ValueError(
                f"eval_mode=False needs {name or 'the model'!r} in eval mode; got a "
                f"{type(module).__name__} in train mode, which mixes samples or adds noise; "
                "call .eval() on it or leave eval_mode=True"
            )
    try:
        if eval_mode:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def hooks_set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Take the tensor hooks off: they would change gradients, or get None for an intercepted one.

    The same dicts are put back, which the hooks' handles refer to.
    """
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    try:
        for p, _ in hooks:
            p._backward_hooks = None
        yield
    finally:
        for p, own in hooks:
            p._backward_hooks = own


def _dropout(module: nn.Module) -> float:
    """Return the dropout probability that a module has of its own."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout
    return 0.0
