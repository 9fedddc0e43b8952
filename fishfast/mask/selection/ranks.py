"""Scores in several processes: what they tell each other, whatever the number of scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fishfast._processes import exchange, gather, message_device, raise_failure
from fishfast.mask.selection.batches import Batches
from fishfast.mask.selection.radix import Take

__all__ = ["Ranks"]

_Result = TypeVar("_Result")

# Histograms of at most 11 bits: what is sent must not depend on the number of scores.
_DIGITS = ((20, 11), (10, 10), (0, 10))


class Ranks:
    """The processes of a group, each with its own shards.

    A rank sends three histograms, 32 KB together, one count per tensor, one count of its own, and
    few words more. An error in one process is raised in all: none waits for a message that does
    not come.

    Args:
        process_group: the group; this process must be in it.
        tensors: this process's tensors; messages travel on their device.
    """

    def __init__(self, process_group: dist.ProcessGroup, tensors: Iterable[Tensor]) -> None:
        self._group = process_group
        self._device = message_device(tensors, process_group)
        self.rank = dist.get_rank(process_group)
        self.replicated: Collection[str] = ()  # names of tensors that every process has whole

    def digits(self, scores: Batches) -> Sequence[tuple[int, int]]:
        """Return the lowest bit and the number of bits of each digit, the same in all processes."""
        return _DIGITS

    def agree(self, work: Callable[[], tuple[dict[str, Any], _Result]]) -> _Result:
        """Do the work; raise in every process unless all of them describe it alike.

        Args:
            work: returns a description, whose values JSON can hold, and a result.

        Returns:
            The result.

        Raises:
            ValueError: another process failed, or describes its work differently.
        """
        mine: dict[str, Any]
        error, result = None, None
        try:
            mine, result = work()
        except BaseException as caught:
            error, mine = caught, {"failure": f"{type(caught).__name__}: {caught}"}
        said = exchange(mine, self._group, self._device)
        if error is not None:
            raise error
        raise_failure(said)
        for rank, other in enumerate(said):
            for what in mine:
                if other[what] != said[0][what]:
                    raise ValueError(
                        "every process must select from the same parameters by the same rules; "
                        + _difference(what, said[0][what], other[what], rank)
                    )
        return result  # type: ignore[return-value]

    def run(self, work: Callable[[], int]) -> int:
        """Return what ``work`` returns in this process.

        Args:
            work: may fail.

        Returns:
            Its result.

        Raises:
            ValueError: another process failed.
        """
        results: list[int] = []

        def silent() -> Tensor:
            results.append(work())
            return torch.empty(0, dtype=torch.int64, device="cpu")

        self.sum(silent, 0)
        return results[0]

    def sum(self, work: Callable[[], Tensor], length: int) -> Tensor:
        """Return the sum over the processes of what ``work`` returns.

        Args:
            work: returns [length] int64 on the CPU, and may fail.
            length: the same in every process.

        Returns:
            [length] int64 on the CPU, the same in every process.

        Raises:
            ValueError: another process failed.
        """
        message = torch.zeros(length + 1, dtype=torch.int64, device="cpu")
        error = None
        try:
            message[:-1] = work()
        except BaseException as caught:
            error = caught
            message[-1] = 1
        message = message.to(self._device)
        dist.all_reduce(message, group=self._group)
        message = message.cpu()
        if message[-1]:
            mine = {} if error is None else {"failure": f"{type(error).__name__}: {error}"}
            said = exchange(mine, self._group, self._device)
            if error is not None:
                raise error
            raise_failure(said)
        return message[:-1]

    def hand_out(self, num_ties: int, names: Sequence[str], equal: Callable[[], list[int]]) -> Take:
        """Return how this process takes its part of the ties: (tensor, rank, index) decides.

        Args:
            num_ties: how many there are for all processes.
            names: the tensors.
            equal: returns, for each tensor, how many scores this process counts that equal the
                threshold.

        Returns:
            The function; a tensor's scores may come in several calls.
        """
        mine: list[int] = []

        def count() -> Tensor:
            mine.extend(equal())
            return torch.tensor(mine, dtype=torch.int64, device="cpu")

        left = self.sum(count, len(names)).tolist()
        for tensor, total in enumerate(left):
            if 0 < num_ties < total:  # they run out here
                left[tensor] = self._own_part(names[tensor], mine[tensor], num_ties)
                num_ties = 0
            else:
                left[tensor] = min(num_ties, total)
                num_ties -= left[tensor]

        def take(tensor: int, equal_here: int) -> int:
            taken = min(left[tensor], equal_here)
            left[tensor] -= taken
            return taken

        return take

    def refuse_other(self, indices: Mapping[str, Tensor]) -> None:
        """Raise in every process where copies of a tensor are not the same.

        Args:
            indices: what was found in each tensor.

        Raises:
            ValueError: the name of the tensor.
        """
        if not self.replicated:  # the same in every process
            return
        found = {
            name: hashlib.sha256(indices[name].cpu().numpy().tobytes()).hexdigest()
            for name in self.replicated
            if name in indices
        }
        said = exchange(found, self._group, self._device)
        for name, digest in said[0].items():
            if any(other[name] != digest for other in said):
                raise ValueError(
                    f"replicated scores must be the same in every process, and not NaN; those of "
                    f"{name!r} are not"
                )

    def _own_part(self, name: str, equal: int, num_ties: int) -> int:
        """Of a tensor's ties the processes before this one come first, with their lower rows."""
        counts = gather(torch.tensor([equal], device=self._device), self._group)
        if name in self.replicated:
            return num_ties
        before = sum(int(count) for count in counts[: self.rank])
        return min(max(0, num_ties - before), equal)


def _difference(what: str, first: Any, other: Any, rank: int) -> str:
    if not isinstance(first, list):
        return f"{what} is {first!r} on rank 0 and {other!r} on rank {rank}"
    here = next((a for a, b in zip(first, other, strict=False) if a != b), None)
    there = next((b for a, b in zip(first, other, strict=False) if a != b), None)
    if here is None and there is None:
        longer = first if len(first) > len(other) else other
        owner = 0 if longer is first else rank
        return f"{what}: {longer[min(len(first), len(other))]} is on rank {owner} only"
    return f"{what}: {here} on rank 0 is {there} on rank {rank}"
