"""Regression on small random batches, and its scores by a loop over single samples in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fishfast as ff

Batch = tuple[Tensor, Tensor]


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


def some_batches(count: int = 4, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(size, 6, generator=generator) for _ in range(2))  # type: ignore[misc]
        for _ in range(count)
    ]


def loop(
    model: nn.Module,
    batches: list[Batch],
    before: Callable[[int], Any] = lambda number: None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] = losses,
) -> dict[str, Tensor]:
    """Return the scores of a batch-1 loop in float64."""
    model.double()
    right = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for number, (x, y) in enumerate(batches):
        before(number)
        for i in range(len(x)):
            loss = loss_fn(model, (x[i : i + 1].double(), y[i : i + 1].double())).sum()
            model.zero_grad()
            loss.backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    right[name] += p.grad.square()
    model.zero_grad()
    model.float()
    return right


def assert_scores(found: ff.Fisher, right: dict[str, Tensor]) -> None:
    for name, scores in right.items():
        torch.testing.assert_close(found[name].double(), scores, rtol=1e-4, atol=1e-9)
