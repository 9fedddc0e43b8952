"""How many weights a mask may select: of the model, of each parameter."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from fishfast.mask.sparse_mask import index_dtype

__all__ = ["Totals", "budget", "everything_of", "shares_by_size"]


class Totals(NamedTuple):
    """How many weights there are: in all, in the mask whatever comes, and in competition."""

    num_params: int
    num_kept: int
    num_eligible: int

    @classmethod
    def of(cls, sizes: Mapping[str, int], kept: Sequence[str], eligible: Sequence[str]) -> Totals:
        """Add up sizes."""
        return cls(
            sum(sizes.values()),
            sum(sizes[name] for name in kept),
            sum(sizes[name] for name in eligible),
        )


def budget(
    totals: Totals, kept: Sequence[str], *, density: float | None, k: int | None, workers: int = 1
) -> int:
    """Return how many weights are left for the eligible parameters once the kept ones are charged.

    Args:
        totals: the weights that there are.
        kept: parameters that are always in the mask, for the message.
        density: k as a share of all weights.
        k: number of weights.
        workers: how many masks are to find so many weights of their own.

    Returns:
        k minus the weights of the kept parameters.

    Raises:
        TypeError: ``density`` is not a number, or ``k`` not a whole one.
        ValueError: both or neither given, out of range, or too small for the kept part.
    """
    num_params = totals.num_params
    if num_params == 0:
        raise ValueError("scores must cover at least one weight; got an empty model")
    if (density is None) == (k is None):
        raise ValueError(f"give density or k, one of them; got density={density}, k={k}")
    if density is not None:
        if not isinstance(density, Real) or isinstance(density, bool):
            raise TypeError(f"density must be a number; got {density!r}")
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1]; got {density}")
        # k / n gives k again; else the decimal that was written, not its binary neighbour: 0.29 of
        # 100 is 29, not 28.
        near = round(float(density) * num_params)
        exact = near / num_params == float(density)
        k = max(1, near if exact else int(Fraction(str(density)) * num_params))
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an integer; got {k!r}")
    k = operator.index(k)  # type: ignore[arg-type]
    if not 1 <= k <= num_params:
        raise ValueError(f"k must be from 1 to the number of weights, {num_params}; got {k}")
    if k < totals.num_kept:
        raise ValueError(
            f"k must cover the kept part; got k={k} for {totals.num_kept} kept weights "
            f"({', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''}); raise density or keep less"
        )
    left = k - totals.num_kept
    if workers * left > totals.num_eligible:
        if workers > 1:
            raise ValueError(
                f"num_workers x (k - kept) must not exceed the weights that are neither kept nor "
                f"excluded, {totals.num_eligible}; got {workers} x ({k} - {totals.num_kept}); "
                "lower density, k or num_workers"
            )
        raise ValueError(
            "k must not exceed the weights that are not excluded, "
            f"{totals.num_kept + totals.num_eligible}; got {k}"
        )
    return left


def everything_of(
    names: Iterable[str], sizes: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Return all indices of each named parameter: what a kept parameter contributes."""
    return {
        name: torch.arange(sizes[name], dtype=index_dtype(sizes[name]), device=device)
        for name in names
    }


def shares_by_size(sizes: Sequence[int], total: int) -> list[int]:
    """Split ``total`` in proportion to size, so that no share shrinks when the total grows.

    Sainte-Lague's rule: weight number s + 1 of a tensor is claimed with ``size / (2 s + 1)``, and
    the ``total`` highest claims are met, ties in the order of the sizes. Shares stay within the
    sizes, and masks nest, which shares by largest remainder do not give.

    Args:
        sizes: number of weights of each.
        total: at most their sum.

    Returns:
        One share for each size.
    """
    if total == 0:
        return [0] * len(sizes)
    everything = sum(sizes)
    # First every claim above everything / (2 total), and no other: -(-a // b) rounds up.
    shares = [-((everything - 2 * total * size) // (2 * everything)) for size in sizes]
    missing = total - sum(shares)
    # The rest one at a time: the next highest claim is met, or the lowest one is not after all.
    step = 1 if missing > 0 else -1

    def claim(position: int) -> tuple[Fraction, int]:
        size, share = sizes[position], shares[position]
        return Fraction(-step * size, 2 * share + step), step * position

    heap = [claim(i) for i, size in enumerate(sizes) if (size if missing > 0 else shares[i])]
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        position = step * heap[0][1]
        shares[position] += step
        if shares[position]:
            heapq.heapreplace(heap, claim(position))
        else:
            heapq.heappop(heap)
    return shares
