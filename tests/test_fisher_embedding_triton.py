"""fishfast.kernels.fisher_embedding against float64 loops: in the interpreter, and on a card."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DTYPES
from triton_cpu import oracle, plain
from triton_cpu.comparing import assert_close, random
from triton_cpu.running import WHERE, run

# Name -> V, D, tokens, samples
LOOKUPS = {
    "one-row": (3, 1, [2], [0]),
    "distinct": (9, 33, [8, 0, 3, 5], [0, 0, 1, 1]),
    "repeated-in-a-sample": (5, 64, [1, 1, 4, 1, 0, 4], [0, 0, 0, 0, 1, 1]),
    "shared-by-samples": (5, 65, [2, 3, 2, 2, 3, 2], [0, 0, 1, 2, 2, 2]),
    "samples-out-of-order": (4, 130, [1, 1, 1, 3, 1, 1], [7, 2, 7, 2, 0, 2]),
    "token-types": (2, 16, [0] * 70 + [1] * 5 + [0] * 33, [0] * 70 + [1] * 38),
}


def check(where, score, tokens, samples, grad, power):
    before = score.clone()
    run(where, "add_embedding", score, tokens, samples, grad, power)
    assert_close(
        score,
        before,
        functools.partial(plain.embedding, tokens=tokens, samples=samples, grad=grad, power=power),
        oracle.embedding(len(score), tokens, samples, grad, power),
    )
    untouched = torch.ones(len(score), dtype=torch.bool)
    untouched[tokens] = False
    assert torch.equal(score[untouched], before[untouched])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_lookups(where, lookup, dtype, power) -> None:
    num_tokens, num_features, tokens, samples = LOOKUPS[lookup]
    grad = random(len(tokens), num_features, dtype=dtype)
    score = torch.rand(num_tokens, num_features)
    check(where, score, torch.tensor(tokens), torch.tensor(samples), grad, power)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_random_rows(where, dtype) -> None:
    tokens, samples = torch.randint(0, 40, (150,)), torch.randint(0, 6, (150,))
    grad = random(150, 70, dtype=dtype)
    check(where, torch.rand(50, 70), tokens, samples, grad, 2)


@pytest.mark.parametrize("where", WHERE)
def test_large_sample_numbers(where) -> None:
    """Sample and token share one sorted key, without mixing."""
    tokens = torch.tensor([1, 0, 1, 0, 1])
    samples = torch.tensor([2**31 + 5, 2**31, 2**31 + 5, 2**31 + 5, 0])
    grad = random(5, 8, dtype=torch.float32)
    check(where, torch.zeros(3, 8), tokens, samples, grad, 2)


@pytest.mark.parametrize("where", WHERE)
def test_strides(where) -> None:
    """A transposed score (a tied head), a slice of a wider gradient; between them is NaN."""
    whole = torch.full((9, 40), torch.nan)
    grad = whole[:, 3:20:2]
    grad.copy_(random(9, 9, dtype=torch.float32))
    tokens, samples = torch.randint(0, 6, (9,)), torch.randint(0, 3, (9,))
    check(where, torch.rand(9, 6).T, tokens, samples, grad, 2)
    check(where, torch.rand(6, 1).expand(6, 9).contiguous(), tokens, samples, grad, 1)


@pytest.mark.parametrize("where", WHERE)
def test_same_bits_every_time(where) -> None:
    """Ties keep their order: the sort is stable."""
    tokens, samples = torch.randint(0, 4, (90,)), torch.randint(0, 3, (90,))
    grad = random(90, 33, dtype=torch.bfloat16)
    scores = [torch.zeros(4, 33) for _ in range(2)]
    for score in scores:
        run(where, "add_embedding", score, tokens, samples, grad, 2)
    assert torch.equal(*scores)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0)], ids=str)
def test_empty(where, shape) -> None:
    score = torch.rand(3, shape[1])
    before = score.clone()
    rows = torch.zeros(shape[0], dtype=torch.int64)
    assert run(where, "add_embedding", score, rows, rows, torch.zeros(shape), 2) <= 0
    assert torch.equal(score, before)


@pytest.mark.gpu
def test_past_two_billion_elements() -> None:
    from fishfast.kernels.fisher_embedding import add_embedding

    score = torch.zeros(2**21 + 8, 1024, device="cuda")
    tokens = torch.tensor([2**21 + 7, 0, 2**21 + 7], device="cuda")
    samples = torch.tensor([0, 0, 0], device="cuda")
    add_embedding(score, tokens, samples, torch.ones(3, 1024, device="cuda"), 2)
    assert (score[-1] == 4.0).all()
    assert (score[0] == 1.0).all()
    assert not score[1:-1].any()
