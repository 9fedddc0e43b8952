"""Modules that wrap a whole model and prefix its names: the model inside is what has a mask."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["refuse_parallel", "unwrapped"]

_PARALLEL = (DataParallel, DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model in ``torch.compile(model)``, DistributedDataParallel or DataParallel.

    Args:
        model: any module; one that wraps nothing is returned as it is.

    Returns:
        The model whose parameters have the names that masks and deltas use.
    """
    while True:
        if isinstance(model, _PARALLEL):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def refuse_parallel(model: nn.Module) -> None:
    """Refuse a model that is wrapped for several devices: the wrapper knows its parameters.

    Args:
        model: any module.

    Raises:
        ValueError: DistributedDataParallel or DataParallel.
    """
    if isinstance(model, _PARALLEL):
        raise ValueError(
            f"model must be wrapped in {type(model).__name__} after train_only; got it wrapped "
            "already, so the wrapper would not know the trained values; pass model.module"
        )
