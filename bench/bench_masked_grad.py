"""The gradient of a layer's masked weights, against the dense gradient and a gather.

The floor is what the gradient tap does and what torch can: dW by its own kernel, then
``dW[indices]``. Also measured: the memory that torch's allocator held meanwhile (on the CPU the
compiled kernel takes its panels, a few MiB at most, beside it). No figure before the result agrees
with float64.

    FISHFAST_BENCH=full python -m pytest bench/bench_masked_grad.py -s --benchmark-enable
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import compare, devices, full_size, peak_bytes, synchronized
from torch import Tensor, nn

import fishfast as ff

_GPU = torch.cuda.is_available()
_SECONDS = 1.0 if full_size() else 0.02
_DENSITIES = [0.001, 0.005, 0.02, 0.1, 0.5] if full_size() else [0.02]
# Sums of some thousand products in another order; bf16 operands, fp32 sums; torch rounds dW.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class Case:
    """A layer, the shape of its input, and what its tokens are drawn from (0: no tokens)."""

    layer: Callable[[], nn.Module]
    input: tuple[int, ...]
    tokens: int = 0


def _linears(rows: int, shapes: list[tuple[int, int]]) -> dict[str, Case]:
    return {
        f"linear {rows} x {outputs} x {inputs}": Case(
            lambda outputs=outputs, inputs=inputs: nn.Linear(inputs, outputs, bias=False),
            (rows, inputs),
        )
        for outputs, inputs in shapes
    }


def _cases() -> dict[str, Case]:
    if not full_size():
        return {
            **_linears(8, [(24, 16)]),
            "conv3x3": Case(lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), (2, 3, 6, 6)),
            "embedding": Case(lambda: nn.Embedding(50, 8), (2, 6), 50),
        }
    scale = 16 if _GPU else 1
    return {
        **_linears(1024 * scale, [(768, 768), (3072, 768), (768, 3072)]),
        **(_linears(8192, [(4096, 4096), (14336, 4096)]) if _GPU else {}),
        "conv3x3 64, 56 x 56": Case(
            lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (8 * scale, 64, 56, 56)
        ),
        "conv3x3 256, 14 x 14": Case(
            lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), (8 * scale, 256, 14, 14)
        ),
        "embedding 30522 x 768": Case(
            lambda: nn.Embedding(30522, 768), (8 * scale, 128), 30522
        ),
    }  # fmt: skip


_CASES = _cases()


def _made(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return case.layer().to(device, dtype)


def _weight_gradient(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """Return the weight's part of backward; nothing else needs a gradient."""
    (parameter,) = (p for p in layer.parameters() if p.requires_grad)
    out = layer(x)

    def run() -> Tensor:
        return torch.autograd.grad(out, parameter, grad, retain_graph=True)[0]

    return run


def _check(title: str, found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """No figure on a red check."""
    error = float((found.double() - exact).norm() / exact.norm())
    assert error <= _TOLERANCE[dtype], f"{title}: relative error {error:.2e}; no figure"


@pytest.mark.parametrize("density", _DENSITIES, ids=lambda density: f"{100 * density:g}%")
@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("device", devices(), ids=str)
def bench_masked_grad(benchmark: Any, name: str, density: float, device: torch.device) -> None:
    """Time the weight's part of one backward, in turns with the dense one and a gather."""
    case, dtype = _CASES[name], torch.bfloat16 if _GPU else torch.float32
    plain, masked = _made(case, device, dtype), _made(case, device, dtype)
    mask = ff.random_mask(masked, density=density, seed=0)
    tuned = ff.train_only(masked, mask)
    x = torch.randn(case.input, device=device, dtype=dtype)
    if case.tokens:
        x = torch.randint(case.tokens, case.input, device=device)
    grad = torch.randn_like(plain(x))
    indices = mask["weight"].to(device)
    dense = _weight_gradient(plain, x, grad)
    exact = _weight_gradient(copy.deepcopy(plain).double(), _wide(x), grad.double())()
    exact = exact.flatten()[indices.long()]

    def floor() -> Tensor:
        return dense().flatten().index_select(0, indices).float()

    run = _weight_gradient(masked, x, grad)
    _check("dense", floor(), exact, dtype)
    _check(name, run(), exact, dtype)
    timing = compare(run, floor, device, _SECONDS)
    peak, floor_peak = peak_bytes(run, device), peak_bytes(floor, device)
    benchmark.pedantic(synchronized(run, device), rounds=1)
    benchmark.extra_info.update(
        timing, case=name, density=density, num_selected=tuned.num_selected, dtype=str(dtype),
        peak_bytes=peak, floor_peak_bytes=floor_peak,
    )  # fmt: skip
    print(
        f"{name:<26} {100 * density:>5g} %  {timing['median_us']:>10.1f} us  dense + gather "
        f"{timing['floor_us']:>10.1f} us, {1 / timing['times_floor']:>6.2f} x  "
        f"{peak / 2**20:>7.2f} MiB held, dense {floor_peak / 2**20:>7.2f} MiB"
    )


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
