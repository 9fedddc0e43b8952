"""The passes of a selection in C++ on CPU threads (csrc/topk_mask_cpu.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishfast import _backend
from fishfast._backend import STORAGE
from fishfast.mask.selection.checks import BadScore

__all__ = ["CpuPasses"]

_TIME = 1.0  # nanoseconds for reading a score


class CpuPasses:
    """Reads the scores once per call, on threads.

    Args:
        scores: flat, contiguous, on the CPU; kept while the passes are.
    """

    def __init__(self, scores: Sequence[Tensor]) -> None:
        self._scores = list(scores)
        self._passes = _backend.compiled().TopkPasses(
            [(score.data_ptr(), score.numel(), STORAGE[score.dtype]) for score in scores],
            num_threads=_backend.num_threads(sum(score.numel() for score in scores) * _TIME),
        )

    def add_histogram(self, counts: Tensor, shift: int, prefix: int) -> None:
        """Add to ``counts`` how many scores have each value of a digit of their bit pattern.

        Args:
            counts: [2**bits] int64 on the CPU; left as it was when a score is bad.
            shift: lowest bit of the digit; with ``shift + bits == 31`` scores are checked too.
            prefix: only scores whose bits above the digit equal it count.

        Raises:
            BadScore: a score that is NaN or negative.
        """
        num_bits = len(counts).bit_length() - 1
        bad, index = self._passes.histogram(shift, num_bits, prefix, counts.data_ptr())
        if bad >= 0:
            raise BadScore(bad, index, float(self._scores[bad][index]))

    def count(self, threshold: int) -> tuple[list[int], list[int]]:
        """Return, per tensor, how many scores are above the threshold and how many equal it."""
        return self._passes.count(threshold)

    def emit(self, ties: Sequence[int], outputs: Sequence[Tensor]) -> None:
        """Write the ascending indices of what is above the threshold last counted, and of ties.

        Args:
            ties: how many of each tensor's scores equal to the threshold are taken, lowest first.
            outputs: one per tensor, int32 or int64, of exactly the number of its indices.
        """
        self._passes.emit(
            list(ties),
            [found.data_ptr() for found in outputs],
            [found.dtype == torch.int64 for found in outputs],
        )
