"""To which shape a call broadcasts its operands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fishfast.fisher.engine.operands import tensors_in
from fishfast.fisher.engine.rules import BROADCASTING

__all__ = ["expands", "result_shape"]

_SHAPE_BY_ARGUMENTS = {
    torch.Tensor.expand, torch.Tensor.expand_as, torch.broadcast_to, torch.Tensor.broadcast_to,
}  # fmt: skip


def result_shape(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Size | None:
    """Return the shape to which a call broadcasts its operands; None where that is not known.

    Args:
        func: what is called.
        args: with what.
        kwargs: likewise.

    Returns:
        The shape, or None.
    """
    if func is F.scaled_dot_product_attention:  # position biases come as its mask
        query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
        return torch.Size((*query.shape[:-1], key.shape[-2]))
    if func in _SHAPE_BY_ARGUMENTS:
        return func(args[0].detach(), *args[1:], **kwargs).shape
    if func in BROADCASTING:
        return _broadcast(*[t.shape for t in tensors_in((args, kwargs))])
    return None


@functools.lru_cache(maxsize=512)
def _broadcast(*shapes: torch.Size) -> torch.Size | None:
    """Return the common shape; torch's own function makes tensors, and imports sympy."""
    result = [1] * max(map(len, shapes))
    for shape in shapes:
        for dim, size in enumerate(reversed(shape), start=1):
            if size != 1 and result[-dim] != size:
                if result[-dim] != 1:
                    return None
                result[-dim] = size
    return torch.Size(result)


def expands(tensor: Tensor, shape: torch.Size) -> bool:
    """Return whether a tensor broadcasts to a shape."""
    return _broadcast(tensor.shape, shape) == shape
