"""`top_k_mask`: the k largest scores of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fishfast.mask.budget import Totals, budget, shares_by_size
from fishfast.mask.selection.checks import Scores
from fishfast.mask.selection.plan import Plan, make_plan
from fishfast.mask.selection.radix import Alone, Processes
from fishfast.mask.selection.ranks import Ranks
from fishfast.mask.selection.shards import describe, local_scores, refuse_group
from fishfast.mask.sparse_mask import SparseMask

__all__ = ["top_k_mask"]


def top_k_mask(
    scores: Mapping[str, Scores],
    *,
    density: float | None = None,
    k: int | None = None,
    keep: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    scope: str = "global",
    backend: str = "auto",
    process_group: dist.ProcessGroup | None = None,
) -> SparseMask:
    """Select the k weights with the largest scores.

    Three promises: exactly k weights, the k largest of the whole model; ties go to the lowest
    (tensor order, index); indices ascend. The result is the same, bit for bit, on every run,
    device and backend, and for any number of threads and processes. This is the FISH mask of Sung,
    Nair and Raffel (NeurIPS 2021), section 2.2, with their rule that a new classifier is always in
    the mask.

    Args:
        scores: name -> scores >= 0, fp32, bf16 or fp16, any shapes, contiguous or not (what is not
            contiguous is copied, a few megabytes at a time; by ``"cuda"`` as a whole). Or what
            `open_scores` returns, for scores that are larger than memory.
        density: k as a share of n = all weights in ``scores``, in (0, 1]; k is rounded down, and
            is at least 1.
        k: number of weights; give either ``density`` or ``k``.
        keep: parameters that are always in the mask, and charged to k: module or parameter paths
            ("classifier") or globs on full names ("*.bias"). A tied weight goes by the name that
            it has in ``scores``.
        exclude: parameters that are never in the mask; they still count in n.
        scope: ``"global"``, or ``"layer"``: every parameter tensor gets the same share of the
            budget that ``keep`` leaves, to a weight by Sainte-Lague's rule. With either, the mask
            of a smaller budget is a subset of that of a larger one.
        backend: ``"auto"``, ``"cuda"``, ``"cpu"`` (compiled) or ``"torch"``; with
            ``process_group`` on CUDA ``"auto"`` is ``"torch"``, and ``"cuda"`` is refused.
        process_group: the processes that the scores are spread over, gloo or NCCL; every process
            makes this call, with the same names in the same order and its own rows (dim 0) of
            each tensor, in the order of the ranks; a process may have none of a tensor's rows.
            DTensors on a mesh of one dimension are taken as they are, placed as ``Shard(0)`` or as
            ``Replicate()``, which is counted once. A rank sends 32 KB, 8 bytes per tensor and a
            few words, whatever n is (``"layer"``: 32 KB per tensor).

    Returns:
        A `SparseMask`. With ``process_group``, of this process's rows: shapes and indices are
        local, and all processes' masks put together are the mask that one process with all the
        scores would get; density and k are of all weights. Where fewer than k scores are above
        zero, zeros fill it up by the tie rule and ``num_zero_score`` counts them, those of this
        process.

    Raises:
        TypeError: scores that are not a mapping to dense tensors of a dtype above, ``density`` or
            ``k`` that is not a number, ``keep`` or ``exclude`` that is no string or iterable.
        ValueError: NaN or negative scores (in kept and excluded parameters too), scores on several
            devices, ``density`` or ``k`` out of range, both or neither, k smaller than the kept
            part, an entry that matches nothing; with ``process_group``, also processes that do
            not ask for the same, and what is refused in one of them, in all.

    Example:
        >>> import torch, fishfast as ff
        >>> scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "head": torch.tensor([0.0])}
        >>> mask = ff.top_k_mask(scores, k=2, keep=["head"])
        >>> {name: found.tolist() for name, found in mask.items()}
        {'a': [0], 'head': [0]}
    """
    refuse_group(scores, process_group)

    def plan_of(local: Mapping[str, Scores]) -> Plan:
        if scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer'; got {scope!r}")
        return make_plan(local, keep, exclude, backend, alone=process_group is None)

    processes: Processes = Alone()
    if process_group is None:
        plan = plan_of(scores)
    else:
        rules = {"density": _plain(density), "k": _plain(k), "scope": repr(scope)}
        plan, processes = _plan_together(scores, plan_of, rules, process_group)

    own = Totals.of(plan.counted_sizes, plan.kept, plan.eligible)
    totals = Totals(*processes.sum(lambda: torch.tensor(own, device="cpu"), 3).tolist())
    left = budget(totals, plan.kept, density=density, k=k)
    groups = {tuple(plan.eligible): left}
    if scope == "layer":
        own_sizes = [plan.counted_sizes[name] for name in plan.eligible]
        sizes = processes.sum(
            lambda: torch.tensor(own_sizes, dtype=torch.int64, device="cpu"), len(own_sizes)
        )
        shares = shares_by_size(sizes.tolist(), left)
        groups = {(name,): share for name, share in zip(plan.eligible, shares, strict=True)}
    groups = {names: count for names, count in groups.items() if count}

    compared = {name for names in groups for name in names}
    num_zero_score = processes.run(lambda: plan.check_aside(compared))
    indices = plan.everything_kept()
    for names, count in groups.items():
        found, zeros = plan.select(names, count, processes)
        indices.update(zip(names, found, strict=True))
        num_zero_score += zeros
    return plan.mask(indices, num_zero_score)


def _plain(number: Any) -> str:
    """Return a number as text, the same for 3 and numpy's 3."""
    if hasattr(number, "__index__"):
        return repr(number.__index__())
    return repr(float(number) if isinstance(number, Real) else number)


def _plan_together(
    scores: Mapping[str, Any],
    plan_of: Callable[[Mapping[str, Scores]], Plan],
    rules: Mapping[str, str],
    process_group: dist.ProcessGroup,
) -> tuple[Plan, Ranks]:
    """Return this process's plan; raise in every process unless all are to select the same."""
    tensors = scores.values() if isinstance(scores, Mapping) else ()
    ranks = Ranks(process_group, [score for score in tensors if isinstance(score, Tensor)])

    def work() -> tuple[dict[str, Any], Plan]:
        local, replicated = local_scores(scores, process_group)
        plan = plan_of(local)
        ranks.replicated = frozenset(replicated)
        if ranks.rank > 0:  # the copies of the first one are counted
            plan = replace(plan, uncounted=ranks.replicated)
        said = {"scores": describe(plan.scores, replicated), "keep": plan.kept}
        return {**said, "eligible": plan.eligible, **rules}, plan

    return ranks.agree(work), ranks
