"""The gradient of a layer's masked weights, against the dense gradient and a gather.

The floor is what the gradient tap does and what torch can: dW by its own kernel, then
``dW[indices]``; above 100 % of it is faster. Memory is what torch's allocator held meanwhile (on
the CPU the compiled kernel takes its panels, a few MiB at most, beside it). Each layer has a mask
like a Fisher's (rank_one.py) and a random one. FLOPs are counted from the plan, kept bytes are
those of the input in a second pass behind an activation. No figure before the result agrees with
float64.

    FISHFAST_BENCH=full python -m pytest bench/bench_masked_grad.py -s --benchmark-enable
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import devices, full_size, record, version
from rank_one import compacted_share, rank_one_mask
from torch import Tensor, nn

import fishfast as ff

_GPU = torch.cuda.is_available()
_DENSITIES = [0.005, 0.001, 0.02, 0.1, 0.5] if full_size() else [0.02]
FLOOR = "dense gradient, gathered"
CONTENDERS = (FLOOR, "fishfast")
MASKS = {"FISH": rank_one_mask, "random": ff.random_mask}
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
        # What README shows comes first: time may run out.
        **_linears(1024 * scale, [(3072, 768)]),
        "embedding 30522 x 768": Case(
            lambda: nn.Embedding(30522, 768), (8 * scale, 128), 30522
        ),
        "conv3x3 256, 14 x 14": Case(
            lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), (8 * scale, 256, 14, 14)
        ),
        **_linears(1024 * scale, [(768, 3072), (768, 768)]),
        **(_linears(8192, [(4096, 4096), (14336, 4096)]) if _GPU else {}),
        "conv3x3 64, 56 x 56": Case(
            lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (8 * scale, 64, 56, 56)
        ),
    }  # fmt: skip


_CASES = _cases()


@dataclass(frozen=True)
class Operands:
    """What both contenders work on, the dense gradient, and that in float64, flat."""

    x: Tensor
    grad: Tensor
    dense: Callable[[], Tensor]
    exact: Tensor


def _made(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return _CASES[name].layer().to(device, torch.bfloat16 if _GPU else torch.float32)


def _weight_gradient(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """Return the weight's part of backward; nothing else needs a gradient."""
    (parameter,) = (p for p in layer.parameters() if p.requires_grad)
    out = layer(x)

    def run() -> Tensor:
        return torch.autograd.grad(out, parameter, grad, retain_graph=True)[0]

    return run


@functools.lru_cache(maxsize=1)
def _operands(name: str, device: torch.device) -> Operands:
    """One layer's input, gradient and exact dW, for every density and both contenders."""
    case, dtype = _CASES[name], torch.bfloat16 if _GPU else torch.float32
    layer = _made(name, device)
    x = torch.randn(case.input, device=device, dtype=dtype)
    if case.tokens:
        x = torch.randint(case.tokens, case.input, device=device)
    grad = torch.randn_like(layer(x))
    exact = _weight_gradient(copy.deepcopy(layer).double(), _wide(x), grad.double())()
    return Operands(x, grad, _weight_gradient(layer, x, grad), exact.flatten())


def check(found: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Refuse a gradient that differs from float64.

    Args:
        found: of the masked weights.
        exact: the same in float64.
        dtype: of the operands: its rounding is allowed.

    Returns:
        The relative error.

    Raises:
        AssertionError: the error is above the tolerance.
    """
    error = float((found.double() - exact).norm() / exact.norm())
    assert error <= _TOLERANCE[dtype], f"relative error {error:.2e}"  # NaN too
    return error


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("density", _DENSITIES, ids=lambda density: f"{100 * density:g}%")
@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("device", devices(), ids=str)
def bench_masked_grad(
    benchmark: Any, contender: str, name: str, density: float, device: torch.device, kind: str
) -> None:
    """Time the weight's part of one backward, in turns with the dense one and a gather."""
    operands, layer = _operands(name, device), _made(name, device)
    mask = MASKS[kind](layer, density=density, seed=0)
    tuned = ff.train_only(layer, mask)
    ours = contender != FLOOR
    flops = _flops(layer, operands.grad) if ours else _dense_flops(layer, operands.grad)
    kept = kept_bytes(layer, operands.x)
    indices = mask["weight"].to(device)

    def floor() -> Tensor:
        return operands.dense().flatten().index_select(0, indices).float()

    run = floor if contender == FLOOR else _weight_gradient(layer, operands.x, operands.grad)
    dtype = operands.grad.dtype
    exact = operands.exact[indices.long()]

    def right(exact: Tensor) -> float:
        check(floor(), exact, dtype)  # no ratio to a wrong floor either
        return check(run(), exact, dtype)

    def gate() -> float:
        error = right(exact)
        operands.grad.neg_()  # in place: what was kept of the first call is not to be timed
        try:
            right(-exact)
        finally:
            operands.grad.neg_()
        return error

    record(
        benchmark, run, device, operands.x.nbytes + operands.grad.nbytes + 8 * len(indices),
        flops=flops, gate=gate, floor=floor, floor_name=FLOOR, stage="masked_grad",
        case=f"{name}, {100 * density:g} % {kind}", contender=contender,
        share_of_flops=flops / max(1, _dense_flops(layer, operands.grad)),
        kept_bytes=kept if ours else operands.x.nbytes, share_of_matrix=compacted_share(mask),
        version=f"{_package(contender)} {version(_package(contender))}", density=density,
        num_selected=tuned.num_selected, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def _dense_flops(layer: Any, grad: Tensor) -> int:
    """Return 2 for each product of the dense gradient; an embedding has sums only."""
    weight = layer._parameters["weight"]
    rows = 0 if isinstance(layer, nn.Embedding) else grad.numel() // weight.shape[0]
    return 2 * rows * weight.numel()


def _flops(layer: Any, grad: Tensor) -> int:
    """Return those of the way that the layer's plan takes for this input."""
    dense, plan = _dense_flops(layer, grad), layer.weight_values.target.plan
    if dense == 0 or plan.least > grad.numel() // grad.shape[-1] * layer.weight.shape[1]:
        return dense
    size = layer.weight.numel()
    if not plan.chunks:
        return dense * len(layer.weight_values) // size
    rows, columns = (
        n if found is None else len(found)
        for n, found in zip(layer.weight.shape, (plan.rows, plan.columns), strict=False)
    )
    return dense * rows * columns // (layer.weight.shape[0] * layer.weight.shape[1])


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes of the input that a layer's second call keeps, behind an activation.

    Args:
        layer: tuned.
        x: an input of it.
    """
    if not x.is_floating_point():
        return x.nbytes
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    for _ in range(2):
        found: dict[int, int] = {}

        def pack(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            address = tensor.untyped_storage().data_ptr()
            if tensor.is_floating_point() and address not in weights:
                found[address] = tensor.untyped_storage().nbytes()
            return tensor

        behind = nn.functional.gelu(x.detach().requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(behind)
    return sum(found.values())


def _package(contender: str) -> str:
    return "torch" if contender == FLOOR else "fishfast"


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
