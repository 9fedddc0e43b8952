"""What the tests of ff.AdamW, ff.Adam and ff.SGD together go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fishfast as ff

Make = Callable[..., torch.optim.Optimizer]


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return ff.AdamW(parameters, **{"lr": 0.05, **options})


def amsgrad(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return ff.Adam(parameters, **{"lr": 0.05, "amsgrad": True, **options})


def sgd(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return ff.SGD(parameters, **{"lr": 0.05, "momentum": 0.9, **options})


MAKERS = pytest.mark.parametrize("make", [adamw, amsgrad, sgd], ids=["AdamW", "Adam", "SGD"])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch"])


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def half_mask(model: nn.Module, seed: int = 0) -> ff.SparseMask:
    return ff.random_mask(model, density=0.5, seed=seed)
