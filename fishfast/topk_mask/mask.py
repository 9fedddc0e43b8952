"""`top_k_mask`: the k largest scores of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fishfast import _backend
from fishfast._names import split_by_rule
from fishfast.mask import SparseMask
from fishfast.topk_mask.budget import budget, everything_of, shares_by_size
from fishfast.topk_mask.checks import check_scores, refuse_bad
from fishfast.topk_mask.select_cpu import select_cpu
from fishfast.topk_mask.select_cuda import select_cuda
from fishfast.topk_mask.select_torch import select_torch

__all__ = ["top_k_mask"]


def top_k_mask(
    scores: Mapping[str, Tensor],
    *,
    density: float | None = None,
    k: int | None = None,
    keep: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    scope: str = "global",
    backend: str = "auto",
) -> SparseMask:
    """Select the k weights with the largest scores.

    Three promises: exactly k weights, the k largest of the whole model; ties go to the lowest
    (tensor order, index); indices ascend. The result is the same, bit for bit, on every run,
    device, backend and number of threads. This is the FISH mask of Sung, Nair and Raffel (NeurIPS
    2021), section 2.2, with their rule that a new classifier is always in the mask.

    Args:
        scores: name -> scores >= 0, fp32, bf16 or fp16, any shapes, contiguous or not (a tensor
            that is not contiguous is copied, one at a time).
        density: k as a share of n = all weights in ``scores``, in (0, 1]; k is rounded down, and
            is at least 1.
        k: number of weights; give either ``density`` or ``k``.
        keep: parameters that are always in the mask, and charged to k: module or parameter paths
            ("classifier") or globs on full names ("*.bias"). A tied weight goes by the name that
            it has in ``scores``.
        exclude: parameters that are never in the mask; they still count in n.
        scope: ``"global"``, or ``"layer"``: every parameter tensor gets the same share of the
            budget that ``keep`` leaves, to a weight by largest remainder.
        backend: ``"auto"``, ``"cuda"``, ``"cpu"`` (compiled) or ``"torch"``.

    Returns:
        A `SparseMask`. Where fewer than k scores are above zero, zeros fill it up by the tie rule
        and ``num_zero_score`` counts them.

    Raises:
        TypeError: scores that are not a mapping to dense tensors of a dtype above, ``density`` or
            ``k`` that is not a number, ``keep`` or ``exclude`` that is no string or iterable.
        ValueError: NaN or negative scores (in kept and excluded parameters too), scores on several
            devices, ``density`` or ``k`` out of range, both or neither, k smaller than the kept
            part, an entry that matches nothing.

    Example:
        >>> import torch, fishfast as ff
        >>> scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "head": torch.tensor([0.0])}
        >>> mask = ff.top_k_mask(scores, k=2, keep=["head"])
        >>> {name: found.tolist() for name, found in mask.items()}
        {'a': [0], 'head': [0]}
    """
    device = check_scores(scores)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer'; got {scope!r}")
    kept, eligible = split_by_rule(list(scores), keep, exclude)
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    sizes = {name: score.numel() for name, score in scores.items()}
    left = budget(sizes, kept, eligible, density=density, k=k)

    chosen = _backend.choose("topk_mask", device, backend)
    select = {"cpu": select_cpu, "cuda": select_cuda, "torch": select_torch}[chosen]
    groups = {tuple(eligible): left}
    if scope == "layer":
        groups = {(name,): share for name, share in shares_by_size(sizes, eligible, left).items()}

    groups = {names: count for names, count in groups.items() if count}
    compared = {name for names in groups for name in names}
    for name, score in scores.items():
        if name not in compared:
            refuse_bad(name, score.detach())

    indices = everything_of(kept, sizes, device)
    num_zero_score = sum(int((scores[name] == 0).sum()) for name in kept)
    for names, count in groups.items():
        found, zeros = select(names, [scores[name].detach() for name in names], count)
        indices.update(zip(names, found, strict=True))
        num_zero_score += zeros
    return SparseMask(indices, shapes, num_zero_score)
