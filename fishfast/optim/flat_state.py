"""New state of an optimizer: views of one buffer for all parameters of a step.

The tensors are in no way special, and a step never relies on where they are: each is contiguous,
has a version counter of its own, and may be replaced or moved. Beside each other they take one
allocation instead of hundreds, and fewer lines of memory to step through.

What they have in common is their storage, which a file of one of them would hold whole,
and which formats without shared memory refuse. So `state_dict` returns copies of such tensors. They
are k values long, and nobody is promised that a write into a state dict changes the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["apart", "new_tensors"]


def new_tensors(like: Sequence[Tensor]) -> list[Tensor]:
    """Return zeros of these shapes, contiguous fp32.

    Args:
        like: tensors on one device.
    """
    flat = torch.zeros(sum(tensor.numel() for tensor in like), device=like[0].device)
    pieces = flat.split([tensor.numel() for tensor in like])
    # .data: a version counter for each, or a write to one would count as one to all.
    return [piece.view(t.shape).data for piece, t in zip(pieces, like, strict=True)]


def apart(state: dict[str, Any]) -> dict[str, Any]:
    """Return one parameter's state with tensors that share no memory with other state.

    Args:
        state: is not changed.
    """
    return {name: value.clone() if _is_part(value) else value for name, value in state.items()}


def _is_part(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.untyped_storage().nbytes() > value.numel() * value.element_size()
