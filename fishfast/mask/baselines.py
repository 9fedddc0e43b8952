"""The masks that the paper compares FISH with: magnitude, random and bias-only (BitFit)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fishfast._lazy import refuse_lazy
from fishfast._wrappers import unwrapped
from fishfast.mask.budget import Totals, budget, everything_of
from fishfast.mask.names import split_by_rule
from fishfast.mask.sparse_mask import SparseMask, index_dtype

__all__ = ["bias_mask", "magnitude_scores", "random_mask"]


def magnitude_scores(model: nn.Module) -> dict[str, Tensor]:
    """Return ``|w|`` of every trainable parameter, as scores for `top_k_mask`.

    Args:
        model: any module; frozen parameters are left out, as in `estimate_fisher`.

    Returns:
        Name -> absolute values, in the parameter's shape and dtype.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model has no trainable parameter, or a lazy one.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(2, 2)
        >>> ff.top_k_mask(ff.magnitude_scores(model), k=3).num_selected
        3
    """
    return {name: p.detach().abs() for name, p in _trainable(model).items()}


def random_mask(
    model: nn.Module,
    *,
    seed: int,
    density: float | None = None,
    k: int | None = None,
    keep: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> SparseMask:
    """Select k weights uniformly at random, in memory of order k.

    Args:
        model: any module; frozen parameters are left out.
        seed: a whole number >= 0; the same seed gives the same mask.
        density: as in `top_k_mask`.
        k: as in `top_k_mask`.
        keep: as in `top_k_mask`: always in the mask and charged to k. A tied weight goes by any of
            its names.
        exclude: as in `top_k_mask`.

    Returns:
        A `SparseMask` on the CPU.

    Raises:
        TypeError: ``model`` is not a module, ``seed`` not an integer, or as `top_k_mask`.
        ValueError: ``seed`` below 0, or as `top_k_mask` for ``density``, ``k``, ``keep`` and
            ``exclude``.

    Example:
        >>> import torch, fishfast as ff
        >>> ff.random_mask(torch.nn.Linear(4, 4), density=0.5, seed=0, keep=["bias"]).num_selected
        10
    """
    sizes, shapes = _sizes(model)
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an integer; got {seed!r}")
    if operator.index(seed) < 0:
        raise ValueError(f"seed must be at least 0; got {seed}")
    kept, eligible = split_by_rule(list(sizes), keep, exclude, _aliases(model))
    left = budget(Totals.of(sizes, kept, eligible), kept, density=density, k=k)
    starts = np.cumsum([0] + [sizes[name] for name in eligible])
    chosen = _sample_without_replacement(
        int(starts[-1]), left, np.random.default_rng(operator.index(seed))
    )
    bounds = np.searchsorted(chosen, starts)
    indices = everything_of(kept, sizes, torch.device("cpu"))
    for position, name in enumerate(eligible):
        own = chosen[bounds[position] : bounds[position + 1]] - starts[position]
        indices[name] = torch.from_numpy(own).to(index_dtype(sizes[name]))
    return SparseMask(indices, shapes)


def bias_mask(
    model: nn.Module, *, keep: str | Iterable[str] = (), exclude: str | Iterable[str] = ()
) -> SparseMask:
    """Select every bias and the kept parameters: BitFit.

    A bias is a parameter whose own name is ``bias``, or starts with ``bias_`` or ends in ``_bias``
    (``in_proj_bias``). Source: Ben-Zaken, Goldberg and Ravfogel, "BitFit" (ACL 2022).

    Args:
        model: any module; frozen parameters are left out.
        keep: also in the mask, as in `random_mask`.
        exclude: never in the mask, as in `random_mask`.

    Returns:
        A `SparseMask` on the CPU.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model has no bias to select, or an entry that matches nothing.

    Example:
        >>> import torch, fishfast as ff
        >>> ff.bias_mask(torch.nn.Linear(4, 3)).num_selected
        3
    """
    sizes, shapes = _sizes(model)
    kept, eligible = split_by_rule(list(sizes), keep, exclude, _aliases(model))
    biases = [name for name in eligible if _is_bias(name)]
    if not any(map(_is_bias, [*kept, *biases])):
        raise ValueError("model must have a bias that is not excluded; got none")
    return SparseMask(everything_of([*kept, *biases], sizes, torch.device("cpu")), shapes)


def _is_bias(name: str) -> bool:
    own = name.rpartition(".")[2]
    return own == "bias" or own.startswith("bias_") or own.endswith("_bias")


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    model = unwrapped(model)
    refuse_lazy(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "model must have parameters with requires_grad=True; got "
            f"{type(model).__name__} with none"
        )
    return parameters


def _sizes(model: nn.Module) -> tuple[Mapping[str, int], dict[str, tuple[int, ...]]]:
    parameters = _trainable(model)
    return (
        {name: p.numel() for name, p in parameters.items()},
        {name: tuple(p.shape) for name, p in parameters.items()},
    )


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return the further names of tied parameters -> the first name, which the mask has."""
    first = {id(p): name for name, p in _trainable(model).items()}
    every = unwrapped(model).named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if p.requires_grad and name != first[id(p)]}


def _sample_without_replacement(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Return k of n numbers, ascending, every k-subset equally likely, in O(k) memory.

    Distinct values of independent draws are a uniformly random subset, and stay one when a random
    part of them is dropped. Past half of n the numbers left out are drawn instead.
    """
    if k > n // 2:
        out = np.ones(n, dtype=bool)
        out[_sample_without_replacement(n, n - k, rng)] = False
        return np.flatnonzero(out)
    chosen = np.empty(0, dtype=np.int64)
    drawn = np.zeros(n, dtype=bool) if k > n // 16 else None  # spares sorting many again and again
    while len(chosen) < k:
        fresh = rng.integers(0, n, size=int(1.1 * (k - len(chosen))) + 16, dtype=np.int64)
        if drawn is not None:
            drawn[fresh] = True
            chosen = np.flatnonzero(drawn)
        else:
            chosen = np.sort(np.concatenate([chosen, fresh]))
            chosen = chosen[np.diff(chosen, prepend=-1) > 0]
    surplus = rng.choice(len(chosen), size=len(chosen) - k, replace=False)
    return np.delete(chosen, surplus)
