"""The optimizer step: fishfast's one launch against torch's fused AdamW, compact and dense.

Baselines: torch.optim.AdamW(fused=True) on the compact values plus a scatter (`attach`), the
strongest one with the same result; and dense on all weights, what a user has today.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import devices, record
from torch import nn

import fishfast as ff

_DENSITY = 0.005
_TENSORS = 16
_SIZES = [10**8, 10**9] if torch.cuda.is_available() else [10**6, 10**7]
_SECTOR = 32  # bytes that one scattered write costs on a GPU; a cache line is 64 on a CPU


def _model(num_params: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    columns = num_params // _TENSORS
    model = nn.Module()
    for position in range(_TENSORS):
        weight = torch.empty(columns, dtype=dtype, device=device).normal_()
        model.register_parameter(f"weight{position}", nn.Parameter(weight))
    return model


def _compact(model: nn.Module) -> ff.SparseTuning:
    tuned = ff.train_only(model, ff.random_mask(model, density=_DENSITY, seed=0))
    for parameter in tuned.parameters():
        parameter.grad = torch.randn_like(parameter)
    return tuned


def _fishfast(model: nn.Module) -> torch.optim.Optimizer:
    return ff.AdamW(_compact(model).parameters(), lr=1e-3)


class _InGraph:
    """Steps as a CUDA graph replays them: two launches, nothing from the host."""

    def __init__(self, model: nn.Module) -> None:
        self._optimizer = ff.AdamW(_compact(model).parameters(), lr=1e-3, capturable=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._optimizer.step()

    def step(self) -> None:
        self._graph.replay()


def _compact_and_scatter(model: nn.Module) -> torch.optim.Optimizer:
    tuned = _compact(model)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    tuned.attach(optimizer)
    return optimizer


def _dense(model: nn.Module) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)


_CONTENDERS: dict[str, Callable[[nn.Module], Any]] = {
    "fishfast": _fishfast,
    **({"fishfast, in a CUDA graph": _InGraph} if torch.cuda.is_available() else {}),
    "torch fused on compact values + scatter": _compact_and_scatter,
    "torch fused, dense": _dense,
}


def _bytes(contender: str, num_params: int, dtype: torch.dtype) -> int:
    if contender == "torch fused, dense":
        return num_params * 7 * dtype.itemsize  # read 4 streams, write 3, all in the weight's dtype
    selected = int(num_params * _DENSITY)
    return selected * (16 + 4 + 12 + _SECTOR)


def _check(device: torch.device, dtype: torch.dtype) -> None:
    """No figure on a red check: one step equals torch's on the same gradients."""
    weights = []
    for make in (_fishfast, _compact_and_scatter):
        torch.manual_seed(0)
        model = _model(16_000, dtype, device)
        make(model).step()
        weights.append(torch.cat([weight.detach().float() for weight in _weights(model)]))
    torch.testing.assert_close(*weights, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if not name.endswith("_values")]


@pytest.mark.parametrize("device", devices(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_params", _SIZES, ids=lambda n: f"n={n:.0e}")
@pytest.mark.parametrize("contender", _CONTENDERS)
def bench_step(
    benchmark: Any, contender: str, num_params: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Time one optimizer step at 0.5 % density."""
    _check(device, dtype)
    optimizer = _CONTENDERS[contender](_model(num_params, dtype, device))
    record(benchmark, optimizer.step, device, _bytes(contender, num_params, dtype))
