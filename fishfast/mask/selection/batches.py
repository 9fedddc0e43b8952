"""Scores as flat, contiguous pieces, however they are stored, a bounded number at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fishfast.files.stored_tensors import StoredTensor
from fishfast.mask.selection.checks import BadScore, Scores
from fishfast.mask.sparse_mask import index_dtype

__all__ = ["Batch", "Batches", "Passes"]

# Scores that are copied at a time: those of a file and of tensors that are not contiguous.
_COPIED_ELEMENTS = 2**20


class Passes(Protocol):
    """What `CpuPasses` and `TorchPasses` do."""

    def __init__(self, scores: Sequence[Tensor]) -> None:
        """Take flat, contiguous scores."""

    def add_histogram(self, counts: Tensor, shift: int, prefix: int) -> None:
        """Count a digit."""

    def count(self, threshold: int) -> tuple[list[int], list[int]]:
        """Count what is above a threshold, and what equals it."""

    def emit(self, ties: Sequence[int], outputs: Sequence[Tensor]) -> None:
        """Write indices."""


class Batch:
    """Neighbouring pieces of tensors, and the passes over them.

    Attributes:
        pieces: the tensor that each is of, its first flat index in it, and its scores.
        tensors: [pieces] which tensor each is of.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[int, int, Tensor]],
        names: Sequence[str],
        sizes: Sequence[int],
        passes: type[Passes],
    ) -> None:
        self.pieces = pieces
        self.tensors = [tensor for tensor, _, _ in pieces]
        self._starts = [start for _, start, _ in pieces]
        self._device = pieces[0][2].device
        self._names, self._sizes = names, sizes
        self._passes = passes([scores for _, _, scores in pieces])
        self._counted: tuple[int, tuple[list[int], list[int]]] | None = None

    def add_histogram(self, counts: Tensor, shift: int, prefix: int) -> None:
        """Do what `CpuPasses.add_histogram` does; a bad score is a ValueError with its name."""
        try:
            self._passes.add_histogram(counts, shift, prefix)
        except BadScore as bad:
            name = self._names[self.tensors[bad.tensor]]
            raise bad.of(name, self._starts[bad.tensor]) from None

    def count(self, threshold: int) -> tuple[list[int], list[int]]:
        """Do what `CpuPasses.count` does, once for a threshold."""
        if self._counted is None or self._counted[0] != threshold:
            self._counted = threshold, self._passes.count(threshold)
        return self._counted[1]

    def emit(self, threshold: int, ties: Sequence[int]) -> list[Tensor]:
        """Return each piece's indices, which count within its whole tensor."""
        greater, _ = self.count(threshold)
        numbers = [above + tied for above, tied in zip(greater, ties, strict=True)]
        dtypes = [index_dtype(self._sizes[tensor]) for tensor in self.tensors]
        # One flat buffer per index width; each piece's indices are a slice of it.
        outputs = [torch.empty(0, device="cpu")] * len(numbers)
        for dtype in set(dtypes):
            of_dtype = [piece for piece, other in enumerate(dtypes) if other == dtype]
            lengths = [numbers[piece] for piece in of_dtype]
            buffer = torch.empty(sum(lengths), dtype=dtype, device=self._device)
            for piece, output in zip(of_dtype, buffer.split(lengths), strict=True):
                outputs[piece] = output
        self._passes.emit(ties, outputs)
        for start, output in zip(self._starts, outputs, strict=True):
            if start:
                output += start
        return outputs


class Batches:
    """Tensors, cut into batches that are read anew each time they are gone through.

    A contiguous tensor is used where it is. What has to be copied, scores in a file and tensors
    that are not contiguous, comes at most a few megabytes at a time; a tensor may be larger.

    Args:
        scores: name -> scores, all on one device.
        passes: what computes on them.
    """

    def __init__(self, scores: Mapping[str, Scores], passes: type[Passes]) -> None:
        self.names, self._scores = list(scores), list(scores.values())
        self.sizes = [score.numel() for score in self._scores]
        self.device = self._scores[0].device if self._scores else torch.device("cpu")
        self.all_bf16 = all(score.dtype == torch.bfloat16 for score in self._scores)
        self._passes = passes
        self.in_place = all(isinstance(s, Tensor) and s.is_contiguous() for s in self._scores)
        self._held = list(self._read()) if self.in_place else None

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._held) if self._held is not None else self._read()

    def _read(self) -> Iterator[Batch]:
        # One buffer for all copies: with a new one each time, the indices that are kept would end
        # up between those that were freed, and memory would grow to the size of the scores.
        buffer = torch.empty(0, device="cpu")
        pieces: list[tuple[int, int, Tensor]] = []
        copied = 0
        for tensor, scores in enumerate(self._scores):
            if isinstance(scores, Tensor) and scores.is_contiguous():
                pieces.append((tensor, 0, scores.view(-1)))
                continue
            if not len(buffer):
                buffer = torch.empty(_COPIED_ELEMENTS, dtype=torch.float32, device=scores.device)
            for start, stop, copy_to in _copies(scores):
                if copied + stop - start > _COPIED_ELEMENTS:
                    yield Batch(pieces, self.names, self.sizes, self._passes)
                    pieces, copied = [], 0
                room = buffer[copied : copied + stop - start]
                piece = room.view(scores.dtype)[: len(room)]
                copy_to(piece)
                pieces.append((tensor, start, piece))
                copied += len(piece)
        if pieces:
            yield Batch(pieces, self.names, self.sizes, self._passes)


def _copies(
    scores: Scores, first: int = 0
) -> Iterator[tuple[int, int, Callable[[Tensor], object]]]:
    """Yield flat ranges of bounded size, in order, and how each is copied to a flat tensor."""
    numel = scores.numel()
    if isinstance(scores, StoredTensor):
        for start in range(0, numel, _COPIED_ELEMENTS):
            stop = min(start + _COPIED_ELEMENTS, numel)
            yield start, stop, functools.partial(scores.read_into, start=start)
    elif numel <= _COPIED_ELEMENTS:
        yield first, first + numel, lambda flat: flat.view(scores.shape).copy_(scores)
    else:
        rows = _COPIED_ELEMENTS // scores[0].numel()
        for part in scores.split(max(1, rows)):
            yield from _copies(part if rows else part[0], first)
            first += part.numel()
