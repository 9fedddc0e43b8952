"""fishfast.kernels.fisher_sum against float64 loops: in the interpreter, and on a card."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DTYPES
from triton_cpu import oracle, plain
from triton_cpu.comparing import assert_close, random
from triton_cpu.running import WHERE, run

# B, T, D: one position, few positions, around a step of each dim, odd sizes.
SHAPES = [(1, 1, 1), (9, 1, 65), (6, 7, 70), (2, 8, 31), (3, 16, 64), (2, 17, 129), (4, 70, 17)]


def check(where, score, grad, x, mean, rstd, power, num_sms=8):
    before = score.clone()
    run(where, "add_sum", score, grad, x, mean, rstd, power, num_sms=num_sms)
    assert_close(
        score,
        before,
        functools.partial(plain.sums, grad=grad, x=x, mean=mean, rstd=rstd, power=power),
        oracle.sums(grad, x, mean, rstd, power),
    )


def rows_statistics(x):
    """Mean and 1 / standard deviation of each position, as a layer norm has them: [B, T, 1]."""
    std = x.float().std(-1, keepdim=True, correction=0)
    return x.float().mean(-1, keepdim=True), 1 / (std + 0.1)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias(where, shape, dtype, power) -> None:
    grad = random(*shape, dtype=dtype)
    check(where, torch.rand(shape[2]), grad, None, None, None, power)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_layer_norm(where, shape, dtype, power) -> None:
    """Statistics per position, broadcast over features."""
    grad, x = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    check(where, torch.rand(shape[2]), grad, x, *rows_statistics(x), power)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("given", ["x", "mean", "rstd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_statistics(where, given, dtype) -> None:
    """A plain multiply, a shift alone, an RMS norm."""
    grad, x = random(3, 40, 33, dtype=dtype), random(3, 40, 33, dtype=dtype, seed=1)
    mean, rstd = rows_statistics(x)
    mean, rstd = mean if given == "mean" else None, rstd if given == "rstd" else None
    check(where, torch.zeros(33), grad, x, mean, rstd, 2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_positions", [5, 49, 300])
def test_channels_first(where, num_positions, dtype) -> None:
    """BatchNorm: a transposed view of [B, C, HW], statistics per channel."""
    grad, x = (random(3, 20, num_positions, dtype=dtype, seed=s).transpose(1, 2) for s in (0, 1))
    mean, rstd = random(20, dtype=torch.float32), random(20, dtype=torch.float32).abs() + 0.5
    check(where, torch.rand(20), grad, x, mean.expand(3, 1, 20), rstd.expand(3, 1, 20), 2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides(where, axis) -> None:
    """Slices in each dim, and a gradient that was expanded; what lies between is NaN."""
    whole = torch.full((12, 60, 80), torch.nan)
    grad = whole[::3, 2:42:2, 5:69]
    grad.copy_(random(4, 20, 64, dtype=torch.float32))
    shape = list(grad.shape)
    shape[axis] = 1
    x = random(*shape, dtype=torch.float32).expand_as(grad)
    check(where, torch.rand(64), grad, x, None, None, 2)
    check(where, torch.rand(64), x, grad, None, None, 1)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("num_sms", [1, 2, 100])
def test_samples_divided_among_programs(where, num_sms) -> None:
    grad = random(37, 2, 70, dtype=torch.float16)
    check(where, torch.rand(70), grad, grad, None, None, 2, num_sms)


@pytest.mark.parametrize("where", WHERE)
def test_score_with_a_stride(where) -> None:
    whole = torch.zeros(3, 65)
    grad = random(4, 30, 65, dtype=torch.float32)
    check(where, whole[1], grad, None, None, None, 2)
    column = torch.zeros(65, 3)[:, 1]
    check(where, column, grad, None, None, None, 2)
    assert not whole[::2].any()


@pytest.mark.parametrize("where", WHERE)
def test_same_bits_every_time(where) -> None:
    grad, x = (random(9, 40, 65, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    scores = [torch.zeros(65) for _ in range(2)]
    for score in scores:
        run(where, "add_sum", score, grad, x, *rows_statistics(x), 2)
    assert torch.equal(*scores)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 0, 5), (4, 3, 0)], ids=str)
def test_empty(where, shape) -> None:
    score = torch.rand(shape[2])
    before = score.clone()
    grad = torch.zeros(shape)
    assert run(where, "add_sum", score, grad, grad, None, None, 2) <= 0
    assert torch.equal(score, before)
