"""The masked gradient of every layer on the road, against float64; and its plan."""

from __future__ import annotations

import math

import pytest
import torch
from masked_grad_cases import (
    CASES,
    CONV,
    EMBEDDING,
    LINEAR,
    assert_gradient,
    cotangent,
    dense_gradient,
    masked_entries,
    tuned_layer,
)
from stepping import same_bits
from torch import nn
from train_only_modules import numbers

import fishfast as ff
from fishfast.training.gradient import chunks as masked_grad_plan
from fishfast.training.gradient import costs, masked_grad
from fishfast.training.gradient.chunks import Plan

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["sums", "chunks", "small chunks"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the gradient of a linear layer or a convolution is computed."""
    if request.param == "sums" and ff.build_info()["operations"]["masked_grad"]["cpu"] != "cpu":
        pytest.skip("the extension is not compiled")
    monkeypatch.setattr(costs, "_SUM", 0.0 if request.param == "sums" else math.inf)
    monkeypatch.setattr(costs, "_TRANSPOSE", 0.0)
    if request.param == "small chunks":
        scratch = dict.fromkeys(masked_grad_plan._SCRATCH_BYTES, 4 * 37 * 4)
        monkeypatch.setattr(masked_grad_plan, "_SCRATCH_BYTES", scratch)
    return request.param


def check(name: str, style: str, dtype: torch.dtype, device: str = "cpu") -> None:
    torch.manual_seed(0)
    make, x = CASES[name]
    layer, x = make().to(device), x.to(device)
    exact = dense_gradient(layer, x, torch.float64, dtype)
    by_torch = dense_gradient(layer, x, dtype, dtype)
    layer = layer.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    tuned = tuned_layer(layer, style)
    assert "dense gradient" not in tuned.report()
    out = layer(x)
    out.backward(cotangent(out))
    (values,) = tuned.parameters()
    entries = tuned.mask["weight"].to(device)
    found = values.grad.clone()
    assert_gradient(found, entries, by_torch, exact)
    # A second call adds; the same bits again.
    layer(x).backward(cotangent(out))
    assert same_bits(values.grad, found + found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*LINEAR, *CONV])
@pytest.mark.usefixtures("arithmetic")
def test_gradient_of_a_layer(name: str, dtype: torch.dtype, device: str) -> None:
    check(name, "few", dtype, device)


@pytest.mark.parametrize("name", ["linear", "linear, 1-d", "gpt2", "conv2d", "conv1d", "embedding"])
def test_gradient_in_fp16(name: str, arithmetic: str) -> None:
    check(name, "few", torch.float16)


@pytest.mark.parametrize("style", ["few rows", "few columns", "one", "last row", "all"])
@pytest.mark.parametrize(
    "name", ["linear", "gpt2", "conv2d", "conv2d, groups", "conv2d, depthwise"]
)
@pytest.mark.usefixtures("arithmetic")
def test_gradient_wherever_the_entries_are(name: str, style: str) -> None:
    check(name, style, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("style", ["few", "one", "all"])
@pytest.mark.parametrize("name", EMBEDDING)
def test_gradient_of_an_embedding(name: str, style: str, dtype: torch.dtype, device: str) -> None:
    check(name, style, dtype, device)


@pytest.mark.parametrize("style", ["few", "one", "all"])
@pytest.mark.parametrize("name", EMBEDDING)
def test_gradient_of_an_embedding_by_torch(
    name: str, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums that run on a GPU, and the same bits as those of the compiled kernel."""
    with monkeypatch.context() as without_kernel:
        without_kernel.setattr(masked_grad, "_is_compiled_for", lambda grad: False)
        check(name, style, torch.float32)
    make, x = CASES[name]
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        layer = make()
        tuned = tuned_layer(layer, style)
        if not compiled:
            monkeypatch.setattr(masked_grad, "_is_compiled_for", lambda grad: False)
        out = layer(x)
        out.backward(cotangent(out))
        found.append(next(tuned.parameters()).grad)
    assert same_bits(*found)


@pytest.mark.parametrize(
    "name", ["linear", "linear, many samples", "gpt2", "embedding", "embedding, wide"]
)
def test_number_of_threads_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x = CASES[name]
    layer = make()
    tuned = tuned_layer(layer, "few")
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(masked_grad._backend, "num_threads", lambda _, threads=threads: threads)
        tuned.model.zero_grad()
        out = layer(x)
        out.backward(cotangent(out))
        found.append(next(tuned.parameters()).grad)
    assert all(same_bits(grad, found[0]) for grad in found)


def test_int32_tokens_of_a_large_vocabulary() -> None:
    """Their places in the weight pass 2**31."""
    shape, token = (2**20, 4096), 600_000
    grad = numbers(1, shape[1])
    wanted = token * shape[1] + torch.arange(8192)  # more than the sums; half are the next token's
    tokens = torch.tensor([token], dtype=torch.int32)
    found = masked_grad.masked_grad(
        "embedding", grad, tokens, wanted, None, None, None, [], shape, [-1]
    )
    assert same_bits(found, torch.cat([grad[0], torch.zeros(4096)]))


@pytest.mark.parametrize("token", [-1, 3, 2**40])
def test_a_token_that_is_not_in_the_weight_is_refused(token: int) -> None:
    """The layer's forward refuses it first; here nothing may be read from behind the weight."""
    if ff.build_info()["operations"]["masked_grad"]["cpu"] != "cpu":
        pytest.skip("the extension is not compiled")
    arguments = (numbers(2, 4), torch.tensor([0, token]), torch.arange(12))
    with pytest.raises(IndexError, match="a token is not in the weight"):
        masked_grad.masked_grad("embedding", *arguments, None, None, None, [], (3, 4), [-1])


def test_sums_over_many_entries_rows_and_blocks() -> None:
    """More entries than a task of the compiled kernel has, and rows without any among them."""
    layer, x = nn.Linear(301, 211), numbers(700, 301)
    exact = dense_gradient(layer, x, torch.float64, torch.float32)
    by_torch = dense_gradient(layer, x, torch.float32, torch.float32)
    tuned = tuned_layer(layer, "few")
    layer(x).backward(cotangent(layer(x)))
    (values,) = tuned.parameters()
    assert len(values) > 3000
    assert_gradient(values.grad, tuned.mask["weight"], by_torch, exact)


# --- the plan ---


def test_plan_takes_rows_and_columns_with_entries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_SUM", math.inf)
    shape = (6, 5)
    entries = torch.tensor([1 * 5 + 0, 1 * 5 + 3, 4 * 5 + 3], dtype=torch.int32)
    plan = Plan.of(shape, entries)
    assert plan.rows is not None
    assert plan.columns is not None
    assert plan.rows.tolist() == [1, 4]
    assert plan.columns.tolist() == [0, 3]
    assert plan.positions is not None
    assert plan.positions.tolist() == [0, 1, 3]
    assert plan.chunks == (0, 2, 0, 3)


def test_plan_skips_chunks_without_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_SUM", math.inf)
    monkeypatch.setattr(masked_grad_plan, "FEW", 0.0)
    monkeypatch.setattr(masked_grad_plan, "_SCRATCH_BYTES", {"cpu": 2 * 4 * 5, "cuda": 0})
    entries = torch.tensor([0, 9, 40, 44], dtype=torch.int32)  # rows 0, 1, 8 and 8 of 10
    plan = Plan.of((10, 5), entries)
    assert plan.chunks == (0, 2, 0, 2, 8, 10, 2, 4)
    assert plan.positions is not None
    assert plan.positions.tolist() == [0, 9, 0, 4]


@pytest.mark.parametrize("per_group", [1, 3, 4])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_chunks_are_whole_groups_or_within_one(per_group: int, most: int) -> None:
    bounds = masked_grad_plan._bounds(12, per_group, most)
    assert [row for start, end in bounds for row in range(start, end)] == list(range(12))
    for start, end in bounds:
        assert end - start <= max(1, most)
        within = start // per_group == (end - 1) // per_group
        assert within or (start % per_group == 0 and end % per_group == 0)


def test_plan_of_one_chunk_needs_no_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_SUM", math.inf)
    assert Plan.of((8, 8), masked_entries(torch.Size((8, 8)), "all")).positions is None
