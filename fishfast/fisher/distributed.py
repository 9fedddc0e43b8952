"""Scores of several processes, each with its own data, summed exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fishfast._processes import exchange, message_device, raise_failure
from fishfast.fisher.kind import ScoreKind

__all__ = ["all_reduce_", "announce_failure"]

# Elements of one message, 64 MB: large enough that a call's latency does not count.
_BUCKET = 2**24


def all_reduce_(
    scores: Mapping[str, Tensor],
    counts: Sequence[int],
    process_group: dist.ProcessGroup,
    *,
    fisher_type: str,
    power: int,
) -> list[int]:
    r"""Sum scores and counts over the processes of a group, in place.

    .. math:: F = \sum_{rank} \sum_{b \in rank} \left( \nabla_\theta \, \ell_b \right)^2

    the sum of squares, not the square of a sum. Call it once, on what each process has scored of
    its own data. Every process gets the same scores, bit for bit. Memory on top of the scores: one
    message of 64 MB.

    Args:
        scores: name -> fp32, contiguous, of the same names and shapes in every process.
        counts: whole numbers such as the samples scored, as many in every process.
        process_group: the group; this process must be in it.
        fisher_type: what the scores are; only compared.
        power: likewise.

    Returns:
        The sums of the counts.

    Raises:
        ValueError: the processes have not scored the same, or one has announced a failure; the
            same message in all of them. Nothing was summed.
    """
    device = message_device(scores.values(), process_group)
    kind = ScoreKind.of(scores, fisher_type, power)
    _agree({"kind": kind, "counts": len(counts)}, process_group, device)
    with torch.no_grad():
        for pieces in _buckets([scores[name] for name in sorted(scores)]):
            _sum_(pieces, process_group, device)
        totals = torch.tensor(list(counts), dtype=torch.int64, device=device)
        dist.all_reduce(totals, group=process_group)
    return totals.tolist()


def announce_failure(
    error: BaseException, scores: Mapping[str, Tensor], process_group: dist.ProcessGroup
) -> None:
    """Make `all_reduce_` raise in the other processes, which would wait for this one.

    Returns when every process has come to `all_reduce_` or here.

    Args:
        error: why this process cannot go on.
        scores: what it would have summed.
        process_group: the group.
    """
    device = message_device(scores.values(), process_group)
    exchange({"failure": f"{type(error).__name__}: {error}"}, process_group, device)


def _agree(mine: dict[str, Any], process_group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise the same error in every process unless all say the same."""
    said = exchange(mine, process_group, device)
    raise_failure(said)
    for rank, other in enumerate(said):
        if other != said[0]:
            first, second = (
                ScoreKind(kind, power, {name: tuple(shape) for name, shape in shapes.items()})
                for kind, power, shapes in (said[0]["kind"], other["kind"])
            )
            difference = first.difference(second, "on rank 0", f"on rank {rank}")
            raise ValueError(
                "every process must score the same parameters in the same way; "
                + (difference or f"the counts differ in number on rank 0 and rank {rank}")
            )


def _buckets(scores: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut scores into flat pieces, in lists of at most a message's elements."""
    bucket: list[Tensor] = []
    room = _BUCKET
    for score in scores:
        flat = score.view(-1)
        while len(flat):
            piece, flat = flat[:room], flat[room:]
            bucket.append(piece)
            room -= len(piece)
            if room == 0:
                yield bucket
                bucket, room = [], _BUCKET
    if bucket:
        yield bucket


def _sum_(pieces: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    message = torch.cat([piece.to(device) for piece in pieces])
    dist.all_reduce(message, group=group)
    for piece, total in zip(pieces, message.split([len(p) for p in pieces]), strict=True):
        piece.copy_(total)
