"""Modules of torch that are lazy: what they have before their first forward is no tensor yet."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["refuse_lazy"]


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model that is not complete yet; torch's own errors name neither weight nor argument.

    Args:
        model: any module.

    Raises:
        ValueError: a parameter or buffer without a shape, such as of a ``LazyLinear``.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(
                f"model must have all of its weights; {name!r} of a {owner} gets its shape from "
                "the first forward; run the model on a batch first"
            )
