"""How many weights a mask may select: of the model, of each parameter."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from fishfast.mask import index_dtype

__all__ = ["budget", "everything_of", "shares_by_size"]


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


def shares_by_size(sizes: Mapping[str, int], names: Sequence[str], total: int) -> dict[str, int]:
    """Split ``total`` in proportion to size; the largest remainders get the weights left over."""
    all_sizes = sum(sizes[name] for name in names)
    exact = {name: Fraction(total * sizes[name], max(1, all_sizes)) for name in names}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(names, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
