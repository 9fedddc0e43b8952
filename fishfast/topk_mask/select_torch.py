"""The selection in torch operations, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fishfast.mask import index_dtype
from fishfast.topk_mask.checks import refuse_bad

__all__ = ["select_torch"]

# Scores counted in one histogram: thousands of small tensors share one.
_JOINED_ELEMENTS = 2**22


def select_torch(
    names: Sequence[str], scores: Sequence[Tensor], k: int
) -> tuple[list[Tensor], int]:
    """Return the indices per tensor, and how many have score 0: two digits of the bit pattern."""
    for name, score in zip(names, scores, strict=True):
        refuse_bad(name, score)
    rank, prefix = k, 0
    for low_digit in (False, True):
        histogram = torch.zeros(2**16, dtype=torch.int64, device=scores[0].device)
        for bits in _joined_bits(scores):
            digit = bits[(bits >> 16) == prefix] & 0xFFFF if low_digit else bits >> 16
            histogram += torch.bincount(digit, minlength=2**16)
        from_top = histogram.flip(0).cumsum(0)
        bin_from_top = int((from_top < rank).sum())
        if bin_from_top:
            rank -= int(from_top[bin_from_top - 1])
        prefix = prefix << 16 | (2**16 - 1 - bin_from_top)
    threshold, ties_left = prefix, rank
    indices = []
    for score in scores:
        bits = _bits(score)
        tied = (bits == threshold).nonzero().squeeze(1)[:ties_left]
        ties_left -= len(tied)
        found = torch.cat([(bits > threshold).nonzero().squeeze(1), tied]).sort().values
        indices.append(found.to(index_dtype(score.numel())))
    return indices, rank if threshold == 0 else 0


def _joined_bits(scores: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the bit patterns of neighbouring tensors together, up to a size."""
    held: list[Tensor] = []
    room = _JOINED_ELEMENTS
    for score in scores:
        held.append(_bits(score))
        room -= score.numel()
        if room <= 0:
            yield torch.cat(held)
            held, room = [], _JOINED_ELEMENTS
    if held:
        yield torch.cat(held)


def _bits(score: Tensor) -> Tensor:
    """fp32 bit patterns, which order non-negative floats; -0.0 counts as 0.0."""
    return score.flatten().float().view(torch.int32) & 0x7FFFFFFF
