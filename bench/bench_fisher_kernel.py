"""The Fisher engine's primitives, one at a time, against the ordinary weight gradient.

The floor is that gradient, of the same shapes, by torch's own kernel (cuBLAS, cuDNN, MKL): a
primitive does the same multiplications, and adds squares. "torch ops" is the best that can be done
without a kernel, eager and compiled (see fisher_kernel_cases.py). No figure before the result
agrees with float64.

    FISHFAST_BENCH=full python -m pytest bench/bench_fisher_kernel.py -s --benchmark-enable
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fisher_kernel_cases import (
    CONTENDERS,
    Add,
    KernelCase,
    conv,
    embedding,
    layer_norm,
    linear,
)
from fisher_reference import WrongScores
from harness import compare, devices, peak_bytes, short_set, skip, why
from shapes import CONV_LAYERS, LINEAR_LAYERS, size_set
from torch import Tensor

# fp32: sums of some thousand products in another order. bf16: a baseline rounds each per-sample
# gradient to bf16, 2**-9, before it is squared.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-7}


Make = Callable[[torch.device, torch.dtype], KernelCase]


def _case(make: Callable[..., KernelCase], **sizes: Any) -> Make:
    return lambda device, dtype: make(device, dtype, **sizes)


def _linears(tokens: int, lengths: list[int], layers: list[tuple[int, int]]) -> dict[str, Make]:
    """Every length at the same number of rows: the floor's work is the same."""
    return {
        f"linear-{outputs}x{inputs}-T{length}": _case(
            linear, batch=max(1, tokens // length), length=length, outputs=outputs, inputs=inputs
        )
        for outputs, inputs in layers
        for length in lengths
    }


def _layers_of(models: list[str], rows: int, length: int, images: int) -> dict[str, Make]:
    """The layers of whole models; the same shape in two of them is one case."""
    cases = {}
    for model in models:
        cases |= _linears(rows, [length], LINEAR_LAYERS.get(model, []))
        for (before, after), side, kernel, stride in CONV_LAYERS.get(model, []):
            cases[f"conv-{before}x{after}-{kernel}x{kernel}-{side}px"] = _case(
                conv, batch=images, channels=(before, after), side=side, kernel=kernel,
                stride=stride,
            )  # fmt: skip
    return cases


def _toy() -> dict[str, Make]:
    return {
        **_linears(12, [1, 4], [(24, 16)]),
        "linear-padded": _case(linear, batch=3, length=8, outputs=8, inputs=12, padded=True),
        "conv3x3": _case(conv, batch=2, channels=(4, 8), side=6, kernel=3),
        "embedding": _case(embedding, batch=3, length=8, tokens=40, width=8),
        "layer_norm": _case(layer_norm, batch=3, length=8, width=16),
    }


def _cpu() -> dict[str, Make]:
    lengths = [1, 16, 128, 1024] if short_set() else [1, 4, 16, 64, 256, 1024, 4096]
    cases = {
        **_linears(lengths[-1], lengths, [(768, 768)]),
        "linear-padded": _case(linear, batch=8, length=128, outputs=768, inputs=768, padded=True),
        "conv3x3": _case(conv, batch=8, channels=(64, 64), side=56, kernel=3),
        "conv3x3-deep": _case(conv, batch=8, channels=(256, 256), side=14, kernel=3),
        "conv7x7": _case(conv, batch=8, channels=(3, 64), side=112, kernel=7, stride=2),
        "depthwise": _case(conv, batch=8, channels=(96, 96), side=56, kernel=7, groups=96),
        "embedding": _case(embedding, batch=8, length=128, tokens=30522, width=768),
        "layer_norm": _case(layer_norm, batch=8, length=128, width=768),
    }
    if not short_set():
        cases |= _layers_of(["BERT-base", "BERT-large", "ResNet-50"], 1024, 128, images=4)
        cases |= _layers_of(["ViT-L"], 1024, 197, images=4)
        cases |= _layers_of(["Llama 1B", "Llama 8B"], 1024, 512, images=4)
    return cases


def _gpu() -> dict[str, Make]:
    lengths = [4**i for i in range(7)] if short_set() else [2**i for i in range(13)]
    rows = 2**14
    cases = {
        **_linears(rows, lengths, [(4096, 1024)]),
        **_layers_of(["BERT-large"], rows, 128, images=64),
        **_layers_of(["ViT-L"], rows, 197, images=64),
        **_layers_of(["Llama 1B", "Llama 8B", "ResNet-50"], rows, 512, images=64),
        "linear-padded": _case(
            linear, batch=128, length=128, outputs=4096, inputs=1024, padded=True
        ),
        "depthwise": _case(conv, batch=64, channels=(96, 96), side=56, kernel=7, groups=96),
        "embedding": _case(embedding, batch=128, length=128, tokens=30522, width=1024),
        "layer_norm": _case(layer_norm, batch=128, length=128, width=1024),
    }
    if not short_set():
        for length in (1, 16, 128, 2048):
            cases |= _layers_of(list(LINEAR_LAYERS), rows, length, images=64)
    return cases


_CASES = {"toy": _toy, "cpu": _cpu, "gpu": _gpu}[size_set(devices()[0])]()


@functools.lru_cache(maxsize=1)
def _made(name: str, device: torch.device) -> tuple[KernelCase, torch.dtype]:
    torch.manual_seed(0)
    # torch.compile would run the ninth shape of a function as it is, uncompiled.
    torch.compiler.reset()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return _CASES[name](device, dtype), dtype


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("device", devices(), ids=str)
def bench_kernel(benchmark: Any, contender: str, name: str, device: torch.device) -> None:
    """Time one primitive, or what torch has in its place."""
    case, dtype = _made(name, device)
    add = case.contenders[contender]
    if isinstance(add, str):
        skip(add, contender, case=case.title)
    if "compiled" in contender:
        _compile(contender, case, add, device)
    error = check(contender, case, add, _TOLERANCE[dtype], device)
    score = torch.zeros(case.shape, device=device)

    def run() -> None:
        add(score)

    timing = compare(run, case.floor, device)
    peak = benchmark.pedantic(peak_bytes, args=(run, device), rounds=1)
    us = timing["median_us"]
    gb_per_s, tflops = case.num_bytes / us / 1e3, case.flops / us / 1e6
    benchmark.extra_info.update(
        timing, case=case.title, contender=contender, dtype=str(dtype).removeprefix("torch."),
        kind=name.split("-T")[0], **case.sizes, relative_error=error, floor_name="weight gradient",
        bytes=case.num_bytes, gb_per_s=gb_per_s, flops=case.flops, tflop_per_s=tflops,
        percent_of_floor=100 / timing["times_floor"], peak_bytes=peak,
    )  # fmt: skip
    print(
        f"{contender:<20} {case.title:<38} {us:>11.1f} us  {timing['times_floor']:>6.2f} x floor  "
        f"{gb_per_s:>7.1f} GB/s  {tflops:>8.3f} TFLOP/s  {peak / 2**20:>8.1f} MiB held"
    )


def check(
    contender: str, case: KernelCase, add: Add, tolerance: float, device: torch.device
) -> float:
    """Refuse what differs from float64, does not add to what is there, or is an earlier result.

    The floor too: no ratio to a wrong one.

    Args:
        contender: its name.
        case: the operands.
        add: what is to be timed.
        tolerance: of the Frobenius norm.
        device: where the operands are.

    Returns:
        The relative error.

    Raises:
        WrongScores: the error is above the tolerance.
    """
    squares, gradient = case.exact()
    errors = []
    for scale in (1, 2):
        case.grad.mul_(scale)  # in place: what was kept of the first call is not to be timed
        right = scale**2 * squares
        before = float(right.mean())
        score = torch.full(case.shape, before, device=device)
        try:
            add(score)
            floor = case.floor()
        finally:
            case.grad.div_(scale)
        errors.append(_error(score.double() - before, right))
        for name, error in (
            (contender, errors[-1]),
            ("the floor", _error(floor, scale * gradient)),
        ):
            if not error <= tolerance:  # NaN too
                raise WrongScores(
                    f"{name} is wrong on {case.title}: relative error {error:.2e}, allowed "
                    f"{tolerance:.2e}; no figure"
                )
    return errors[0]


def _error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def _compile(contender: str, case: KernelCase, add: Add, device: torch.device) -> None:
    try:
        add(torch.zeros(case.shape, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that it does not know yet
        skip(why(error), contender, case=case.title)
