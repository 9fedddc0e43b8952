"""`top_k_mask`: the k largest scores of the whole model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from fishfast import _backend
from fishfast._names import split_by_rule
from fishfast.mask import SparseMask, index_dtype

__all__ = ["budget", "everything_of", "top_k_mask"]

# Codes of csrc/storage.h.
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Scores counted in one histogram of the torch path: thousands of small tensors share one.
_JOINED_ELEMENTS = 2**22


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
        backend: ``"auto"``, ``"cpu"`` (compiled) or ``"torch"``.

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
    device = _check_scores(scores)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer'; got {scope!r}")
    kept, eligible = split_by_rule(list(scores), keep, exclude)
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    sizes = {name: score.numel() for name, score in scores.items()}
    left = budget(sizes, kept, eligible, density=density, k=k)

    chosen = _backend.choose("topk_mask", device, backend)
    select = _select_compiled if chosen == "cpu" else _select_torch
    groups = {tuple(eligible): left}
    if scope == "layer":
        groups = {(name,): share for name, share in _shares(sizes, eligible, left).items()}

    groups = {names: count for names, count in groups.items() if count}
    compared = {name for names in groups for name in names}
    for name, score in scores.items():
        if name not in compared:
            _refuse_bad(name, score.detach())

    indices = everything_of(kept, sizes, device)
    num_zero_score = sum(int((scores[name] == 0).sum()) for name in kept)
    for names, count in groups.items():
        found, zeros = select(names, [scores[name].detach() for name in names], count)
        indices.update(zip(names, found, strict=True))
        num_zero_score += zeros
    return SparseMask(indices, shapes, num_zero_score)


def budget(
    sizes: Mapping[str, int],
    kept: Sequence[str],
    eligible: Sequence[str],
    *,
    density: float | None,
    k: int | None,
) -> int:
    """Return how many weights are left for the eligible parameters once the kept ones are charged.

    Args:
        sizes: name -> number of weights.
        kept: parameters that are always in the mask.
        eligible: parameters that compete for the rest.
        density: k as a share of all weights.
        k: number of weights.

    Returns:
        k minus the weights of the kept parameters.

    Raises:
        TypeError: ``density`` is not a number, or ``k`` not a whole one.
        ValueError: both or neither given, out of range, or too small for the kept part.
    """
    num_params = sum(sizes.values())
    if num_params == 0:
        raise ValueError("scores must cover at least one weight; got an empty model")
    if (density is None) == (k is None):
        raise ValueError(f"give density or k, one of them; got density={density}, k={k}")
    if density is not None:
        if not isinstance(density, Real) or isinstance(density, bool):
            raise TypeError(f"density must be a number; got {density!r}")
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1]; got {density}")
        # The decimal that was written, not its binary neighbour: 0.29 of 100 is 29, not 28.
        k = max(1, int(Fraction(str(density)) * num_params))
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an integer; got {k!r}")
    k = operator.index(k)  # type: ignore[arg-type]
    if not 1 <= k <= num_params:
        raise ValueError(f"k must be from 1 to the number of weights, {num_params}; got {k}")
    num_kept = sum(sizes[name] for name in kept)
    if k < num_kept:
        raise ValueError(
            f"k must cover the kept part; got k={k} for {num_kept} kept weights "
            f"({', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''}); raise density or keep less"
        )
    num_eligible = sum(sizes[name] for name in eligible)
    if k - num_kept > num_eligible:
        raise ValueError(
            "k must not exceed the weights that are not excluded, "
            f"{num_kept + num_eligible}; got {k}"
        )
    return k - num_kept


def everything_of(
    names: Iterable[str], sizes: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Return all indices of each named parameter: what a kept parameter contributes."""
    return {
        name: torch.arange(sizes[name], dtype=index_dtype(sizes[name]), device=device)
        for name in names
    }


def _check_scores(scores: Mapping[str, Tensor]) -> torch.device:
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"scores must be a mapping of names to tensors; got {type(scores).__name__}; "
            "estimate_fisher and magnitude_scores return one"
        )
    if not scores:
        raise ValueError("scores must cover at least one weight; got an empty mapping")
    for name, score in scores.items():
        got: object = None
        if not isinstance(score, Tensor):
            got = type(score).__name__
        elif score.dtype not in _STORAGE:
            got = score.dtype
        elif score.layout != torch.strided:
            got = score.layout
        if got is not None:
            raise TypeError(
                f"scores must be dense float32, bfloat16 or float16 tensors; got {got} for {name!r}"
            )
    devices = {score.device: name for name, score in scores.items()}
    if len(devices) > 1:
        listed = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"scores must be on one device; got {listed}; move them with .to()")
    return next(iter(devices))


def _refuse_bad(name: str, score: Tensor) -> None:
    # min() hands NaN on, and needs no mask of n elements unless there is something to report.
    if score.numel() and not score.min() >= 0:
        _refuse(name, score, int((~(score >= 0)).flatten().nonzero()[0]))


def _refuse(name: str, score: Tensor, index: int) -> None:
    value = float(score.flatten()[index])
    raise ValueError(
        f"scores must be >= 0 and not NaN; got {value} at flat index {index} of {name!r}"
    )


def _shares(sizes: Mapping[str, int], names: Sequence[str], total: int) -> dict[str, int]:
    """Split ``total`` in proportion to size; the largest remainders get the weights left over."""
    all_sizes = sum(sizes[name] for name in names)
    exact = {name: Fraction(total * sizes[name], max(1, all_sizes)) for name in names}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(names, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _select_compiled(
    names: Sequence[str], scores: Sequence[Tensor], k: int
) -> tuple[list[Tensor], int]:
    """csrc/topk_mask_cpu.cpp: indices per tensor, and how many of them have score 0."""
    scores = [score.contiguous() for score in scores]
    selection = _backend.compiled().TopkSelection(
        [(score.data_ptr(), score.numel(), _STORAGE[score.dtype]) for score in scores],
        k=k,
        num_threads=_backend.num_threads(),
    )
    if selection.bad_tensor >= 0:
        bad = selection.bad_tensor
        _refuse(names[bad], scores[bad], selection.bad_index)
    counts = selection.num_selected
    dtypes = [index_dtype(score.numel()) for score in scores]
    # One flat buffer per index width; each tensor's indices are a slice of it.
    buffers = {
        dtype: torch.empty(
            sum(count for count, other in zip(counts, dtypes, strict=True) if other == dtype),
            dtype=dtype,
        )
        for dtype in set(dtypes)
    }
    filled = dict.fromkeys(buffers, 0)
    indices = []
    for count, dtype in zip(counts, dtypes, strict=True):
        indices.append(buffers[dtype][filled[dtype] : filled[dtype] + count])
        filled[dtype] += count
    selection.emit(
        [found.data_ptr() for found in indices], [dtype == torch.int64 for dtype in dtypes]
    )
    return indices, selection.num_zero_score


def _select_torch(
    names: Sequence[str], scores: Sequence[Tensor], k: int
) -> tuple[list[Tensor], int]:
    """The same selection in torch operations, on any device: two digits of the bit pattern."""
    for name, score in zip(names, scores, strict=True):
        _refuse_bad(name, score)
    rank, prefix = k, 0
    for low_digit in (False, True):
        histogram = torch.zeros(2**16, dtype=torch.int64, device=scores[0].device)
        for bits in _joined_bits(scores):
            digit = bits[(bits >> 16) == prefix] & 0xFFFF if low_digit else bits >> 16
            histogram += torch.bincount(digit, minlength=2**16)
        from_top = histogram.flip(0).cumsum(0)
        bin_from_top = int((from_top < rank).sum())
        if bin_from_top:
            rank -= int(from_top[bin_from_top - 1])
        prefix = prefix << 16 | (2**16 - 1 - bin_from_top)
    threshold, ties_left = prefix, rank
    indices = []
    for score in scores:
        bits = _bits(score)
        tied = (bits == threshold).nonzero().squeeze(1)[:ties_left]
        ties_left -= len(tied)
        found = torch.cat([(bits > threshold).nonzero().squeeze(1), tied]).sort().values
        indices.append(found.to(index_dtype(score.numel())))
    return indices, rank if threshold == 0 else 0


def _joined_bits(scores: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the bit patterns of neighbouring tensors together, up to a size."""
    held: list[Tensor] = []
    room = _JOINED_ELEMENTS
    for score in scores:
        held.append(_bits(score))
        room -= score.numel()
        if room <= 0:
            yield torch.cat(held)
            held, room = [], _JOINED_ELEMENTS
    if held:
        yield torch.cat(held)


def _bits(score: Tensor) -> Tensor:
    """fp32 bit patterns, which order non-negative floats; -0.0 counts as 0.0."""
    return score.flatten().float().view(torch.int32) & 0x7FFFFFFF
