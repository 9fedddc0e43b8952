"""What this device does at its best, as calls to time in turns with a case: copies and reads."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["copy_of", "read_of"]

_PIECE = 2**27  # fp32 elements: what no cache holds; longer work goes over them again


@functools.lru_cache(maxsize=1)
def copy_of(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """Return a call that moves as many bytes, half of them read and half written.

    Args:
        num_bytes: rounded to whole fp32 numbers.
        device: where.
    """
    source, pieces = _source(num_bytes // 8, device)
    target = torch.empty_like(source)

    def run() -> None:
        for piece in pieces:
            target[:piece].copy_(source[:piece])

    return run


@functools.lru_cache(maxsize=1)
def read_of(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """Return a call that reads as many bytes: a sum.

    Args:
        num_bytes: rounded to whole fp32 numbers.
        device: where.
    """
    source, pieces = _source(num_bytes // 4, device)

    def run() -> list[Tensor]:
        return [source[:piece].sum() for piece in pieces]

    return run


def _source(elements: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Return ones, and how many of them each pass takes."""
    whole, rest = divmod(max(1, elements), _PIECE)
    pieces = [_PIECE] * whole + [rest] * bool(rest)
    return torch.ones(max(pieces), device=device), pieces
