"""Scores of which each process has its own rows: plain tensors, files, or DTensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

__all__ = ["describe", "local_scores", "refuse_dtensors", "refuse_group"]


def local_scores(
    scores: Mapping[str, Any], process_group: dist.ProcessGroup
) -> tuple[dict[str, Any], list[str]]:
    """Return this process's part of the scores.

    Args:
        scores: name -> this process's rows, or a DTensor.
        process_group: the group that the rows are spread over.

    Returns:
        Name -> this process's rows, and the names of tensors that every process has whole.

    Raises:
        ValueError: a DTensor on another group or placed otherwise, or a tensor without rows.
    """
    if not isinstance(scores, Mapping):
        return scores, []  # check_scores says so
    local, replicated = {}, []
    for name, score in scores.items():
        if _is_dtensor(score):
            if _is_replicated(name, score, process_group):
                replicated.append(name)
            score = score.to_local()
        elif len(getattr(score, "shape", "-")) == 0:
            raise ValueError(
                f"scores in several processes must be sharded on dim 0; {name!r} is a scalar, "
                "which has none; give a DTensor placed as Replicate(), or shape [1] in one process "
                "and [0] in the others"
            )
        local[name] = score
    return local, replicated


def _is_dtensor(score: Any) -> bool:
    """Where there is a DTensor its module has been imported, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(score, module.DTensor)


def _is_replicated(name: str, score: Any, process_group: dist.ProcessGroup) -> bool:
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = score.device_mesh, score.placements
    if mesh.ndim != 1 or mesh.mesh.tolist() != dist.get_process_group_ranks(process_group):
        raise ValueError(
            f"DTensor scores must be on a mesh of one dimension over process_group; {name!r} is on "
            f"{mesh}; redistribute it, or pass mesh.get_group()"
        )
    placement = placements[0]
    # By type: what torch derives from Shard puts its rows in another order.
    if type(placement) is Replicate:
        return True
    if type(placement) is Shard and placement.dim == 0:
        return False
    raise ValueError(
        f"DTensor scores must be placed as Shard(0) or Replicate(); {name!r} is {placement}; "
        "redistribute it"
    )


def describe(scores: Mapping[str, Any], replicated: list[str]) -> list[str]:
    """Return what must be the same in every process: names, dtypes, and shapes but for the rows."""
    whole = set(replicated)
    return [
        f"{name!r} of {score.dtype} "
        + (
            f"in shape {tuple(score.shape)}"
            if name in whole
            else f"in rows {tuple(score.shape[1:])}"
        )
        for name, score in scores.items()
    ]


def refuse_dtensors(scores: Any, rule: str) -> None:
    """Refuse DTensors, by a rule that says what to do."""
    for name, score in scores.items() if isinstance(scores, Mapping) else ():
        if _is_dtensor(score):
            raise ValueError(f"{rule}; {name!r} is a DTensor")


def refuse_group(scores: Any, process_group: Any) -> None:
    """Refuse what is no group that this process is in, and DTensors without one."""
    if process_group is None:
        refuse_dtensors(scores, "process_group must be mesh.get_group() for DTensor scores")
    elif not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup; got {process_group!r}; "
            "this process may not be in the group"
        )
