"""Pairs of runs on the same weights: ordinary steps, and capturable ones on simulated kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from simt.sparse_step_backend import BACKEND
from stepping import (
    gradients_over_time,
    random_tensors,
    same_bits,
    snapshot_of_ours,
    some_indices,
    steps_of_ours,
    tune,
)
from torch import Tensor

import fishfast as ff

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (ff.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW, amsgrad": (ff.AdamW, {"lr": 0.05, "amsgrad": True, "betas": (0.3, 0.5)}),
    "Adam": (ff.Adam, {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    "SGD": (ff.SGD, {"lr": 0.05}),
    "SGD, momentum": (ff.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.25}),
    "SGD, nesterov": (ff.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}
EACH = pytest.mark.parametrize("case", CASES)
# With a count of steps, which is what a replay and an overflow must get right.
COUNTING = pytest.mark.parametrize("case", ["AdamW, amsgrad", "SGD, momentum"])
SHAPES = ((37, 11), (1,), (1025,), (5, 3, 2, 2))


def rates(lr: float) -> Iterator[Any]:
    """Yield the learning rate in every form that a step takes."""
    yield from (lr, torch.tensor(lr), torch.tensor([lr]), torch.tensor(lr, dtype=torch.float64))


def pair(case: str, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, ...]:
    """Return handle and optimizer of an ordinary and of a capturable run of the same weights."""
    weights = [w.to(dtype) for w in random_tensors(*SHAPES)]
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)
    indices = [some_indices(w.numel()) for w in weights]
    return (*run(case, weights, indices, "cpu", False, **more),
            *run(case, weights, indices, BACKEND, True, **more))  # fmt: skip


def run(
    case: str, weights: Any, indices: Any, backend: str, capturable: bool, **more: Any
) -> tuple[ff.SparseTuning, torch.optim.Optimizer]:
    make, options = CASES[case]
    tuned = tune(weights, indices)
    options = {**options, **more, "backend": backend, "capturable": capturable}
    return tuned, make(tuned.parameters(), **options)


def series_of(steps: int) -> list[list[Tensor]]:
    return gradients_over_time(random_tensors(*SHAPES), steps)


def assert_alike(ours: Any, optimizer: Any, expected: Any, reference: Any) -> None:
    """Compare weights and states; a capturable SGD counts steps, too."""
    found, wanted = snapshot_of_ours(ours, optimizer), snapshot_of_ours(expected, reference)
    if isinstance(optimizer, ff.SGD):
        found = {name: value for name, value in found.items() if not name.endswith(".step")}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert same_bits(found[name], value), name
    for mine, other in zip(ours.parameters(), expected.parameters(), strict=True):
        assert same_bits(mine, other)


def warmed_up(case: str, **more: Any) -> tuple[Any, ...]:
    """Return a pair after one step each, and the same gradients in both."""
    runs = pair(case, **more)
    expected, reference, ours, optimizer = runs
    (gradients,) = series_of(1)
    steps_of_ours(expected, reference, [gradients])
    steps_of_ours(ours, optimizer, [gradients])
    return runs
