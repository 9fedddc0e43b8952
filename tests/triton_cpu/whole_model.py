"""Scores whole models with the Triton kernels: called in the worker."""

from __future__ import annotations

import torch
from fisher_checks import score
from models import CASES, huggingface


def scores(kind: str, power: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    case = CASES[kind]() if kind in CASES else huggingface(kind)
    fisher = score(case, power=power, backend="triton")
    assert not fisher.fallback
    return dict(fisher)
