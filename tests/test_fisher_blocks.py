"""Weights and biases, scales and shifts in one call, against float64 loops, on every backend."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DTYPES
from triton_cpu import oracle, plain
from triton_cpu.comparing import assert_close, random
from triton_cpu.running import skip_without_interpreter
from triton_cpu.worker import worker

from fishfast.fisher.engine import accumulate, accumulate_cpu

BACKENDS = ["torch", "cpu", "interpreter"]
# B, T, O, I: one position, few, around a tile, more than the compiled kernel takes, odd sizes.
SHAPES = [(5, 1, 7, 9), (3, 2, 33, 31), (2, 17, 6, 16), (4, 8, 1, 1), (2, 70, 20, 35)]


def call(backend, operation, scores, *args):
    """Add to both scores in place; return how many kernels were launched in the interpreter."""
    if backend != "interpreter":
        module = accumulate if backend == "torch" else accumulate_cpu
        return getattr(module, f"add_{operation}")(*args)
    skip_without_interpreter()
    file = {"blocks": "fisher_linear", "sum": "fisher_sum"}[operation]
    _, after, checked = worker().call(f"fishfast.kernels.{file}", f"add_{operation}", args, 8)
    for before, changed in zip(args, after, strict=True):
        if any(before is score for score in scores if score is not None):
            before.copy_(changed)
    return checked["launches"]


def check_blocks(backend, weight, bias, grad, x, power, transposed=False):
    """Compare both with loops over the samples; ``transposed`` passes ``weight [I, O]`` itself."""
    num_samples, length = grad.shape[:2]
    score = weight.T if transposed else weight
    bounds = torch.arange(num_samples) * length, torch.arange(1, num_samples + 1) * length
    before = score.clone(), None if bias is None else bias.clone()
    left, right = (x, grad) if transposed else (grad, x)
    launches = call(backend, "blocks", (weight, bias), weight, bias, left, right, transposed, power)
    rows = [t.reshape(-1, t.shape[-1]) for t in (grad, x)]
    assert_close(
        score,
        before[0],
        functools.partial(
            plain.linear, grad=rows[0], x=rows[1], starts=bounds[0], ends=bounds[1], power=power
        ),
        oracle.linear(*rows, *bounds, power),
    )
    if bias is not None:
        check_sum(bias, before[1], grad, None, None, None, power)
    return launches


def check_sum(score, before, grad, x, mean, rstd, power):
    assert_close(
        score,
        before,
        functools.partial(plain.sums, grad=grad, x=x, mean=mean, rstd=rstd, power=power),
        oracle.sums(grad, x, mean, rstd, power),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_weight_and_bias(backend, shape, dtype, power) -> None:
    num_samples, length, num_out, num_in = shape
    grad = random(num_samples, length, num_out, dtype=dtype)
    x = random(num_samples, length, num_in, dtype=dtype, seed=1)
    weight, bias = torch.rand(num_out, num_in), torch.rand(num_out)
    launches = check_blocks(backend, weight, bias, grad, x, power)
    assert backend != "interpreter" or launches <= 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("has_bias", [True, False])
def test_weight_stored_transposed(backend, has_bias, length) -> None:
    """GPT-2's: the score is [I, O], and the gradient stands on the right."""
    grad = random(3, length, 10, dtype=torch.float32)
    x = random(3, length, 18, dtype=torch.float32, seed=1)
    bias = torch.rand(10) if has_bias else None
    check_blocks(backend, torch.rand(18, 10), bias, grad, x, 2, transposed=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(5, 9, 1), (0, 9, 0), (9, 9, 9), (0, 0, 0)], ids=str)
def test_rows_of_padding_count_nothing(backend, lengths) -> None:
    """Their input may be anything that is finite; rows of zeros before the last one stay."""
    grad = random(3, 9, 20, dtype=torch.float32)
    grad[:, 0] = 0
    for sample, length in zip(grad, lengths, strict=True):
        sample[length:] = 0
    x = random(3, 9, 12, dtype=torch.float32, seed=1)
    check_blocks(backend, torch.rand(20, 12), torch.rand(20), grad, x, 2)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_what_lies_beside_padding_is_not_read(backend) -> None:
    grad = random(2, 6, 5, dtype=torch.float32)
    x = random(2, 6, 4, dtype=torch.float32, seed=1)
    grad[0, 4:], grad[1, 5:] = 0, 0
    clean = x.clone()
    x[0, 4:], x[1, 5:] = torch.inf, torch.nan
    weight, bias = torch.zeros(5, 4), torch.zeros(5)
    call(backend, "blocks", (weight, bias), weight, bias, grad, x, False, 2)
    wanted = torch.zeros(5, 4), torch.zeros(5)
    call(backend, "blocks", wanted, *wanted, grad, clean, False, 2)
    assert torch.equal(weight, wanted[0])
    assert torch.equal(bias, wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_is_no_padding(backend) -> None:
    grad, x = torch.zeros(1, 4, 3), torch.ones(1, 4, 2)
    grad[0, 3, 1] = torch.nan
    weight, bias = torch.zeros(3, 2), torch.zeros(3)
    call(backend, "blocks", (weight, bias), weight, bias, grad, x, False, 2)
    assert weight[1].isnan().all()
    assert bias[1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend) -> None:
    """Time first, a slice of a fused projection, a bias in every second place."""
    grad = random(9, 3, 40, dtype=torch.float32)[..., 8:28].transpose(0, 1)
    x = random(9, 3, 24, dtype=torch.float32, seed=1).transpose(0, 1)[..., ::2]
    check_blocks(backend, torch.rand(40, 24)[::2, ::2], torch.rand(40)[::2], grad, x, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_nothing(backend, shape) -> None:
    num_samples, length, num_out, num_in = shape
    grad, x = torch.ones(num_samples, length, num_out), torch.ones(num_samples, length, num_in)
    weight, bias = torch.rand(num_out, num_in), torch.rand(num_out)
    before = weight.clone(), bias.clone()
    call(backend, "blocks", (weight, bias), weight, bias, grad, x, False, 2)
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_without_inputs_has_a_bias(backend) -> None:
    grad, bias = random(2, 3, 4, dtype=torch.float32), torch.zeros(4)
    call(backend, "blocks", (bias,), torch.zeros(4, 0), bias, grad, torch.ones(2, 3, 0), False, 2)
    check_sum(bias, torch.zeros(4), grad, None, None, None, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 5), (2, 20, 300), (9, 5, 67)], ids=str)
@pytest.mark.parametrize("statistics", ["mean-and-rstd", "rstd", "none"])
def test_scale_and_shift(backend, statistics, shape, dtype, power) -> None:
    grad, x = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    mean = x.float().mean(-1, keepdim=True) if statistics == "mean-and-rstd" else None
    rstd = random(*shape[:2], 1, dtype=torch.float32).abs() + 0.5 if "rstd" in statistics else None
    scale, shift = torch.rand(shape[2]), torch.rand(shape[2])
    before = scale.clone(), shift.clone()
    call(backend, "sum", (scale, shift), scale, grad, x, mean, rstd, power, shift)
    check_sum(scale, before[0], grad, x, mean, rstd, power)
    check_sum(shift, before[1], grad, None, None, None, power)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_same_bits_for_any_number_of_threads(threads, monkeypatch) -> None:
    from fishfast import _backend

    grad, x = (random(3, 40, 700, dtype=torch.float32, seed=seed) for seed in (0, 1))
    found = []
    for number in (1, threads):
        monkeypatch.setattr(_backend, "num_threads", lambda _, number=number: number)
        scores = torch.zeros(700, 700), torch.zeros(700), torch.zeros(700), torch.zeros(700)
        accumulate_cpu.add_blocks(*scores[:2], grad, x, False, 2)
        accumulate_cpu.add_sum(scores[2], grad, x, None, None, 2, scores[3])
        found.append(scores)
    assert all(map(torch.equal, *found))
