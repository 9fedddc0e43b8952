"""The global top-k: fishfast's radix select against torch.topk.

torch.topk takes one tensor: a model's scores are concatenated first, and that is charged. It gives
its indices unordered and picks any of equal scores, which is less than a mask needs. The floor is
one read of the scores; what may be reached is a little more than two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import devices, full_size, record
from torch import Tensor

import fishfast as ff

_NUM_PARAMS = 2**16
_TENSORS = 20
if full_size():
    _NUM_PARAMS = 2**30 if torch.cuda.is_available() else 2**22
    _TENSORS = 400
_DENSITIES = [0.0001, 0.005, 0.02, 0.5] if full_size() else [0.005, 0.5]
Scores = dict[str, Tensor]


def _lognormal(scores: Tensor) -> None:
    scores.log_normal_(mean=-8.0, std=2.0)


def _all_equal(scores: Tensor) -> None:
    scores.fill_(0.3)


def _mostly_zero(scores: Tensor) -> None:
    scores.uniform_().sub_(0.95).clamp_(min=0)


def _one_bin(scores: Tensor) -> None:
    """All share the upper 16 bits: the first digit tells nothing."""
    scores.view(torch.int32).random_(0x3F800000, 0x3F810000)


_VALUES = {
    "lognormal": _lognormal,
    "all equal": _all_equal,
    "mostly zero": _mostly_zero,
    "one bin": _one_bin,
}


def _scores(
    fill: Callable[[Tensor], None], num_tensors: int, num_params: int, device: Any
) -> Scores:
    """Tensors of uneven size, the largest a few hundred times the smallest."""
    weights = torch.arange(1, num_tensors + 1).double() ** 2
    sizes = (num_params * weights / weights.sum()).long()
    sizes[-1] += num_params - sizes.sum()
    scores = {f"t{i}": torch.empty(n, device=device) for i, n in enumerate(sizes.tolist())}
    for score in scores.values():
        fill(score)
    return scores


def _fishfast(scores: Scores, k: int) -> object:
    return ff.top_k_mask(scores, k=k)


def _torch_topk(scores: Scores, k: int) -> object:
    tensors = list(scores.values())
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return torch.topk(joined, k, sorted=False)


_CONTENDERS = {"fishfast": _fishfast, "torch.topk": _torch_topk}


def _check(fill: Callable[[Tensor], None], density: float, device: torch.device) -> None:
    """No figure on a red check: a stable sort of the same kind of scores gives the same mask."""
    scores = _scores(fill, 20, 50_000, device)
    k = int(density * 50_000)
    order = torch.cat(list(scores.values())).sort(descending=True, stable=True).indices
    mask = ff.top_k_mask(scores, k=k)
    starts = [0, *torch.tensor([s.numel() for s in scores.values()]).cumsum(0).tolist()]
    found = torch.cat([mask[name] + start for name, start in zip(scores, starts, strict=False)])
    assert torch.equal(found, order[:k].sort().values)


@pytest.mark.parametrize("device", devices(), ids=str)
@pytest.mark.parametrize("num_tensors", [1, _TENSORS], ids=lambda count: f"tensors={count}")
@pytest.mark.parametrize("density", _DENSITIES)
@pytest.mark.parametrize("values", _VALUES)
@pytest.mark.parametrize("contender", _CONTENDERS)
def bench_top_k(
    benchmark: Any,
    contender: str,
    values: str,
    density: float,
    num_tensors: int,
    device: torch.device,
) -> None:
    """Time one selection; the bytes are those of one read of the scores."""
    _check(_VALUES[values], density, device)
    scores = _scores(_VALUES[values], num_tensors, _NUM_PARAMS, device)
    k = int(density * _NUM_PARAMS)
    run = _CONTENDERS[contender]
    record(benchmark, lambda: run(scores, k), device, 4 * _NUM_PARAMS)
