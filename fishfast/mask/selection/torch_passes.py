"""The passes of a selection in torch operations, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fishfast.mask.selection.checks import BadScore

__all__ = ["TorchPasses"]

# Scores looked at together: thousands of small tensors share an operation, and what operations
# make on their way never has the size of a large tensor.
_RUN_ELEMENTS = 2**22


class _Piece(NamedTuple):
    tensor: int
    start: int
    scores: Tensor


class TorchPasses:
    """`CpuPasses` in torch: the same results, bit for bit, on any device.

    Args:
        scores: flat, contiguous, on one device; kept while the passes are.
    """

    def __init__(self, scores: Sequence[Tensor]) -> None:
        self._num_tensors = len(scores)
        self._threshold = 0
        self._runs: list[list[_Piece]] = []
        room = 0
        for tensor, score in enumerate(scores):
            for start in range(0, len(score), _RUN_ELEMENTS):
                piece = _Piece(tensor, start, score[start : start + _RUN_ELEMENTS])
                if len(piece.scores) > room:
                    self._runs.append([])
                    room = _RUN_ELEMENTS
                self._runs[-1].append(piece)
                room -= len(piece.scores)

    def add_histogram(self, counts: Tensor, shift: int, prefix: int) -> None:
        """Do what `CpuPasses.add_histogram` does."""
        num_bins = len(counts)
        top = shift + num_bins.bit_length() - 1
        found = torch.zeros_like(counts)
        for run in self._runs:
            if top == 31:
                _refuse_bad(run)
            bits = _bits(run)
            if top < 31:
                bits = bits[(bits >> top) == prefix]
            digits = (bits >> shift) & (num_bins - 1)
            found += torch.bincount(digits, minlength=num_bins).cpu()
        counts += found

    def count(self, threshold: int) -> tuple[list[int], list[int]]:
        """Do what `CpuPasses.count` does."""
        self._threshold = threshold
        greater, equal = [0] * self._num_tensors, [0] * self._num_tensors
        for run in self._runs:
            bits = _bits(run)
            last = torch.tensor([len(p.scores) for p in run], device="cpu").cumsum(0) - 1
            for sums, found in ((greater, bits > threshold), (equal, bits == threshold)):
                up_to = found.cumsum(0)[last.to(bits.device)].cpu()
                here = up_to.diff(prepend=torch.zeros_like(up_to[:1])).tolist()
                for piece, number in zip(run, here, strict=True):
                    sums[piece.tensor] += number
        return greater, equal

    def emit(self, ties: Sequence[int], outputs: Sequence[Tensor]) -> None:
        """Do what `CpuPasses.emit` does."""
        filled, ties_left = [0] * self._num_tensors, list(ties)
        for piece in (piece for run in self._runs for piece in run):
            output = outputs[piece.tensor]
            if filled[piece.tensor] == len(output):
                continue
            bits = _bits([piece])
            taken = bits > self._threshold
            if ties_left[piece.tensor]:
                tied = (bits == self._threshold).nonzero().squeeze(1)[: ties_left[piece.tensor]]
                ties_left[piece.tensor] -= len(tied)
                taken[tied] = True
            found = taken.nonzero().squeeze(1) + piece.start
            output[filled[piece.tensor] :][: len(found)] = found
            filled[piece.tensor] += len(found)


def _bits(run: Sequence[_Piece]) -> Tensor:
    """fp32 bit patterns, which order non-negative floats; -0.0 counts as 0.0."""
    patterns = [piece.scores.float().view(torch.int32) & 0x7FFFFFFF for piece in run]
    return torch.cat(patterns) if len(patterns) > 1 else patterns[0]


def _refuse_bad(run: Sequence[_Piece]) -> None:
    # min() hands NaN on; fp32 holds every score exactly.
    if torch.cat([piece.scores.float() for piece in run]).min() >= 0:
        return
    for piece in run:
        if len(bad := (~(piece.scores >= 0)).nonzero()):
            index = int(bad[0])
            raise BadScore(piece.tensor, piece.start + index, float(piece.scores[index]))
