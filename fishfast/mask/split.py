"""`split_mask`: complementary masks for several workers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fishfast.mask.budget import Totals, budget
from fishfast.mask.selection.batches import Batches
from fishfast.mask.selection.checks import Scores
from fishfast.mask.selection.plan import make_plan
from fishfast.mask.selection.radix import Alone
from fishfast.mask.selection.shards import refuse_dtensors
from fishfast.mask.sparse_mask import SparseMask

__all__ = ["split_mask"]


def split_mask(
    scores: Mapping[str, Scores],
    *,
    num_workers: int,
    density: float | None = None,
    k: int | None = None,
    keep: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    backend: str = "auto",
) -> list[SparseMask]:
    """Deal the weights with the largest scores out to workers that train complementary parts.

    With h kept weights, the ``num_workers x (k - h)`` best others are taken and dealt in turn by
    score: the best to worker 0, the next to worker 1, and so on around, ties by (tensor order,
    index). So no weight outside ``keep`` is in two masks, and every worker gets good ones. The
    kept weights are in every mask and charged to each. The masks are the same, bit for bit, for
    the same scores on every run, device, backend and number of threads.

    Sung, Nair and Raffel (NeurIPS 2021) propose that workers train strictly complementary
    subsets of the parameters (section 1); dealing by score is our rule for which.

    Args:
        scores: as in `top_k_mask`.
        num_workers: number of masks, at least 1.
        density: k of each mask as a share of all weights, as in `top_k_mask`.
        k: number of weights of each mask.
        keep: as in `top_k_mask`; in every mask.
        exclude: as in `top_k_mask`.
        backend: as in `top_k_mask`.

    Returns:
        ``num_workers`` masks of k weights. Takes about 60 bytes for each of their weights.

    Raises:
        TypeError: ``num_workers`` is not an integer, or as `top_k_mask`.
        ValueError: ``num_workers`` below 1, more weights asked for than compete, or as
            `top_k_mask`.

    Example:
        >>> import torch, fishfast as ff
        >>> scores = {"a": torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0]), "head": torch.tensor([0.0])}
        >>> for mask in ff.split_mask(scores, num_workers=2, k=3, keep=["head"]):
        ...     print({name: found.tolist() for name, found in mask.items()})
        {'a': [0, 3], 'head': [0]}
        {'a': [2, 4], 'head': [0]}
    """
    if isinstance(num_workers, bool) or not hasattr(num_workers, "__index__"):
        raise TypeError(f"num_workers must be an integer; got {num_workers!r}")
    num_workers = operator.index(num_workers)
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1; got {num_workers}")
    refuse_dtensors(scores, "split_mask needs all scores in one process; call .full_tensor()")
    plan = make_plan(scores, keep, exclude, backend)
    totals = Totals.of(plan.sizes, plan.kept, plan.eligible)
    each = budget(totals, plan.kept, density=density, k=k, workers=num_workers)

    zeros_kept = plan.check_aside(plan.eligible if each else ())
    if not each:
        return [plan.mask(plan.everything_kept(), zeros_kept) for _ in range(num_workers)]
    best, _ = plan.select(plan.eligible, num_workers * each, Alone())
    bits = _bits_at(plan.batches(plan.eligible), best)
    # In the order of (tensor, index) before, so that a stable sort leaves ties in it.
    order = bits.sort(descending=True, stable=True).indices
    worker_of = torch.empty_like(order)
    worker_of[order] = torch.arange(len(order), device=order.device) % num_workers
    lengths = [len(found) for found in best]
    masks = []
    for worker in range(num_workers):
        own = worker_of == worker
        dealt = [found[part] for found, part in zip(best, own.split(lengths), strict=True)]
        num_zeros = zeros_kept + int((bits[own] == 0).sum())
        indices = {**plan.everything_kept(), **dict(zip(plan.eligible, dealt, strict=True))}
        masks.append(plan.mask(indices, num_zeros))
    return masks


def _bits_at(batches: Batches, indices: Sequence[Tensor]) -> Tensor:
    """Return the bit patterns of the scores at each tensor's ascending indices, in one vector."""
    found = [torch.empty(0, dtype=torch.int32, device=indices[0].device)]
    done = [0] * len(indices)
    for batch in batches:
        for tensor, start, scores in batch.pieces:
            rest = indices[tensor][done[tensor] :]
            here = rest[: int(torch.searchsorted(rest, start + len(scores)))]
            done[tensor] += len(here)
            found.append(scores[(here - start).long()].float().view(torch.int32) & 0x7FFFFFFF)
    return torch.cat(found)
