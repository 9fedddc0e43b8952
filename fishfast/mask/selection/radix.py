"""Radix select: one algorithm for scores in memory, in files and in several processes.

Non-negative floats order as their bit patterns do. Digits of the pattern, from the top, fix the
threshold, which is the k-th largest score; all above it are in the mask, and of those equal to it
the first ones by (tensor, index). Each digit is one read of the scores, so are the counts, and so
is the emission: four in memory with digits of 15 and 16 bits, three when all scores are bf16. To
read few scores in memory is faster than to count in so many bins: they take three short digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fishfast.mask.selection.batches import Batches
from fishfast.mask.sparse_mask import index_dtype

__all__ = ["Alone", "Processes", "Take", "select", "zeros_of"]

# Lowest bit and number of bits of each digit of the 31-bit magnitude.
_WIDE = ((16, 15), (0, 16))
_NARROW = ((21, 10), (11, 10), (0, 11))
_FEW_SCORES = 2**18  # up to which narrow digits are faster: 1.0 against 3.3 ms for 1e5 on 2 cores
_BF16_BITS = 16  # the lower bits of a bf16 are zero

# (tensor, how many of its next scores equal the threshold) -> how many of those are in the mask.
Take = Callable[[int, int], int]


class Processes(Protocol):
    """What a selection asks of the processes that take part in it."""

    def digits(self, scores: Batches) -> Sequence[tuple[int, int]]:
        """Return the lowest bit and the number of bits of each digit, from the top."""

    def run(self, work: Callable[[], int]) -> int:
        """Return what ``work`` returns in this process; what fails in one fails in all."""

    def sum(self, work: Callable[[], Tensor], length: int) -> Tensor:
        """Return the sum over the processes of what ``work`` returns, [length] int64."""

    def hand_out(self, num_ties: int, names: Sequence[str], equal: Callable[[], list[int]]) -> Take:
        """Return how this process takes its part of the ties; it asks tensor by tensor."""

    def refuse_other(self, indices: Mapping[str, Tensor]) -> None:
        """Raise where a tensor that every process has whole has other indices elsewhere."""


class Alone:
    """A process that has all the scores."""

    def digits(self, scores: Batches) -> Sequence[tuple[int, int]]:
        """Return what is fastest for so many scores; the mask is the same."""
        return _NARROW if scores.in_place and sum(scores.sizes) <= _FEW_SCORES else _WIDE

    def run(self, work: Callable[[], int]) -> int:
        """Return what ``work`` returns."""
        return work()

    def sum(self, work: Callable[[], Tensor], length: int) -> Tensor:
        """Return what ``work`` returns."""
        return work()

    def hand_out(self, num_ties: int, names: Sequence[str], equal: Callable[[], list[int]]) -> Take:
        """Return a function that serves tensors in the order in which they come."""
        left = num_ties

        def take(tensor: int, equal_here: int) -> int:
            nonlocal left
            taken = min(left, equal_here)
            left -= taken
            return taken

        return take

    def refuse_other(self, indices: Mapping[str, Tensor]) -> None:
        """There is no elsewhere."""


def select(
    own: Batches, k: int, processes: Processes, counted: Batches | None = None
) -> tuple[list[Tensor], int]:
    """Select the k largest scores of all processes.

    Args:
        own: the scores of this process; every process has the same tensors, with scores of its
            own.
        k: from 1 to the number of scores.
        processes: who takes part.
        counted: what this process counts, where that is not all it has, as another process counts
            its copy; a tensor that is not counted is empty.

    Returns:
        The ascending indices of each tensor of this process, and how many have score 0.

    Raises:
        ValueError: a score that is NaN or negative, in any process.
    """
    counted = counted or own
    threshold, num_ties = _find_threshold(counted, own.all_bf16, k, processes)

    def equal() -> list[int]:
        sums = [0] * len(own.names)
        for batch in counted:
            for tensor, number in zip(batch.tensors, batch.count(threshold)[1], strict=True):
                sums[tensor] += number
        return sums

    take = processes.hand_out(num_ties, own.names, equal)
    parts: list[list[Tensor]] = [[] for _ in own.names]

    def emit() -> int:
        tied = 0
        for batch in own:
            _, equal_here = batch.count(threshold)
            ties = [take(t, number) for t, number in zip(batch.tensors, equal_here, strict=True)]
            tied += sum(ties)
            for tensor, found in zip(batch.tensors, batch.emit(threshold, ties), strict=True):
                parts[tensor].append(found)
        return tied

    tied = processes.run(emit)  # it may read a file
    indices = []
    for found, size in zip(parts, own.sizes, strict=True):
        nothing = torch.empty(0, dtype=index_dtype(size), device=own.device)
        indices.append(found[0] if len(found) == 1 else torch.cat([nothing, *found]))
    processes.refuse_other(dict(zip(own.names, indices, strict=True)))
    return indices, tied if threshold == 0 else 0


def zeros_of(batches: Batches) -> list[int]:
    """Return how many scores of each tensor are 0, and refuse bad ones, by name."""
    zeros = [0] * len(batches.names)
    shift, num_bits = _WIDE[0]
    for batch in batches:
        counts = torch.zeros(2**num_bits, dtype=torch.int64, device="cpu")
        batch.add_histogram(counts, shift, 0)
        for tensor, number in zip(batch.tensors, batch.count(0)[1], strict=True):
            zeros[tensor] += number
    return zeros


def _find_threshold(
    batches: Batches, all_bf16: bool, k: int, processes: Processes
) -> tuple[int, int]:
    """Return the k-th largest score's bit pattern, and how many scores equal to it are taken."""
    prefix, rank = 0, k
    for shift, num_bits in processes.digits(batches):
        if all_bf16 and shift + num_bits <= _BF16_BITS:
            prefix <<= num_bits
            continue

        def histogram(shift: int = shift, num_bits: int = num_bits, prefix: int = prefix) -> Tensor:
            counts = torch.zeros(2**num_bits, dtype=torch.int64, device="cpu")
            for batch in batches:
                batch.add_histogram(counts, shift, prefix)
            return counts

        from_top = processes.sum(histogram, 2**num_bits).flip(0).cumsum(0)
        above = int(torch.searchsorted(from_top, rank))  # bins that are in the mask as a whole
        if above:
            rank -= int(from_top[above - 1])
        prefix = prefix << num_bits | (2**num_bits - 1 - above)
    return prefix, rank
