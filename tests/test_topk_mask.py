"""`top_k_mask` against numpy's stable sort: the same k, the same order, the same bits."""

from __future__ import annotations

import pickle
import time

import numpy as np
import oracle
import pytest
import torch
from cases import CHUNK, DTYPES, SIZES, VALUES
from topk_cases import BACKENDS, few_values

import fishfast as ff
from fishfast import _backend
from fishfast.mask.selection import radix


def named(sizes, make, dtype=torch.float32):
    return {f"t{i}": make(n).to(dtype) for i, n in enumerate(sizes)}


def assert_is_top_k(mask, scores, k):
    """The mask selects what the stable sort puts first, in ascending int32 indices."""
    truth = oracle.top_k(scores, k)
    assert list(mask) == list(scores)
    for name, found in mask.items():
        assert found.dtype == torch.int32
        np.testing.assert_array_equal(found.numpy(), truth[name], err_msg=name)
    zeros = sum(
        int((scores[name].reshape(-1)[found.long()] == 0).sum()) for name, found in mask.items()
    )
    assert mask.num_zero_score == zeros


def some_k(n):
    """Return the smallest, the largest and some between."""
    return sorted({min(max(1, k), n) for k in (1, 2, n // 200, n // 3, n - 1, n)})


@pytest.fixture(params=[*BACKENDS, "cpu, wide digits", "torch, wide digits"])
def backend(request, monkeypatch):
    """What selects; with the digits of many scores, too."""
    name, _, wide = request.param.partition(", ")
    if wide:
        monkeypatch.setattr(radix, "_FEW_SCORES", 0)
    return name


@pytest.fixture
def threads(monkeypatch):
    """Set torch's number of threads, which all work then; put back afterwards."""
    monkeypatch.setattr(_backend, "_START_OF_THREADS", 0)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- the k largest, ties to the lowest (tensor, index) --------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("make", [VALUES[0], VALUES[1]])
def test_sizes(sizes, make, backend):
    scores = named(sizes, make)
    for k in some_k(sum(sizes)):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", VALUES)
def test_values(make, dtype, backend):
    scores = named([31, 1009, 0, 4001], make, dtype)
    for k in some_k(5041):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


def test_every_k_of_a_small_model(backend):
    scores = named([5, 0, 1, 13], VALUES[1].values[0])
    for k in range(1, 20):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


def test_every_fp16_pattern_is_ordered(backend):
    bits = torch.arange(0x7C01, dtype=torch.int16)[torch.randperm(0x7C01)]  # 0 to +inf
    scores = {"w": bits.view(torch.float16)}
    for k in (1, 1025, 30000, 0x7C00):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


def test_dtypes_are_compared_by_value(backend):
    """0.3 is smaller in bf16 than in fp32, and larger in fp16 than both."""
    scores = {
        "fp32": torch.tensor([0.3, 0.25, 0.0, 70000.0]),
        "bf16": torch.tensor([0.3, 0.25, -0.0, 70000.0], dtype=torch.bfloat16),
        "fp16": torch.tensor([0.3, 0.25, 6e-8, 65504.0], dtype=torch.float16),
    }
    for k in range(1, 13):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t.T, id="transposed"),
        pytest.param(lambda t: t[:, ::3], id="strided"),
        pytest.param(lambda t: t[7:], id="with-an-offset"),
        pytest.param(lambda t: t[:1].expand(50, -1), id="expanded"),
        pytest.param(
            lambda t: t.view(10, 5, 8, 5).to(memory_format=torch.channels_last), id="nhwc"
        ),
        pytest.param(lambda t: torch.nn.Parameter(t), id="a-parameter"),
        pytest.param(lambda t: t[3, 4], id="a-scalar"),
    ],
)
def test_indices_count_in_row_major_order_of_the_shape(view, backend):
    scores = {"a": view(few_values(50, 40)), "b": few_values(9)}
    for k in some_k(scores["a"].numel() + 9):
        mask = ff.top_k_mask(scores, k=k, backend=backend)
        assert_is_top_k(mask, {name: s.detach() for name, s in scores.items()}, k)
        assert mask.shapes["a"] == tuple(scores["a"].shape)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ten_thousand_tiny_tensors(backend):
    scores = {
        f"t{i}": score for i, score in enumerate(few_values(20_000).split([1, 3, 0, 4] * 2500))
    }
    started = time.process_time()  # of the CPU: on a busy machine, too
    mask = ff.top_k_mask(scores, density=0.1, backend=backend)
    assert time.process_time() - started < 60  # about 1; was 90 with one histogram per tensor
    assert_is_top_k(mask, scores, 2000)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_mask(threads, count):
    sizes = [5 * CHUNK + 3, 100, 3 * CHUNK]
    scores = named(sizes, VALUES[1].values[0])
    threads(1)
    expected = ff.top_k_mask(scores, density=0.3, backend="cpu")
    threads(count)
    for _ in range(3):
        mask = ff.top_k_mask(scores, density=0.3, backend="cpu")
        assert mask == expected
        assert all(torch.equal(mask[name], expected[name]) for name in scores)


def test_backends_agree(simulated):
    scores = named([3 * CHUNK + 5, 17, 2 * CHUNK], VALUES[-1].values[0])
    masks = [ff.top_k_mask(scores, density=0.02, backend=backend) for backend in BACKENDS]
    assert masks[0] == masks[1] == masks[2]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("make", [VALUES[0], VALUES[1], VALUES[4]])
def test_a_smaller_budget_selects_a_subset(make, scope):
    scores = named([5000, 300, 0, 40_000, 77], make)
    rules = {"scope": scope, "keep": "t4"}
    wide, narrow = (ff.top_k_mask(scores, density=d, **rules) for d in (0.02, 0.005))
    assert narrow.num_selected == 226
    for name in scores:
        assert set(narrow[name].tolist()) <= set(wide[name].tolist())


def test_scores_are_left_as_they_were(simulated):
    scores = named([100, 33], VALUES[0].values[0])
    scores["t0"] = scores["t0"].view(10, 10).T
    before = {name: score.clone() for name, score in scores.items()}
    for backend in BACKENDS:
        ff.top_k_mask(scores, k=10, backend=backend)
    assert all(torch.equal(scores[name], before[name]) for name in scores)


@pytest.mark.large
def test_more_than_2_to_the_31_scores_in_one_tensor():
    n = 2**31 + 100
    scores = {"big": torch.zeros(n, dtype=torch.bfloat16), "small": torch.zeros(5)}
    places = [0, CHUNK, 2**31 - 1, 2**31, n - 1]
    scores["big"][places] = 2.0
    scores["small"][4] = 1.0
    mask = ff.top_k_mask(scores, k=8, backend="cpu")
    # 5 twos, 1 one, then the zeros with the lowest index.
    assert mask["big"].tolist() == [0, 1, 2, CHUNK, 2**31 - 1, 2**31, n - 1]
    assert mask["big"].dtype == torch.int64
    assert mask["small"].tolist() == [4]
    assert mask["small"].dtype == torch.int32
    assert (mask.num_params, mask.num_zero_score) == (n + 5, 2)
    scores["big"][n - 2] = torch.nan
    with pytest.raises(ValueError, match=f"nan at flat index {n - 2} of 'big'"):
        ff.top_k_mask(scores, k=8, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_view_that_negates_is_taken_at_its_values(backend):
    scores = torch.tensor([1 - 3j, 2 - 1j, 3 - 2j]).conj().imag  # 3, 1, 2
    assert ff.top_k_mask({"w": scores}, k=1, backend=backend)["w"].tolist() == [0]
    negative = torch._neg_view(torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="must be >= 0"):
        ff.top_k_mask({"w": negative}, k=1, backend=backend)


def test_a_pickled_mask_is_as_large_as_its_indices():
    mask = ff.top_k_mask({f"t{i}": torch.rand(500) for i in range(100)}, density=0.5)
    assert len(pickle.dumps(mask)) < 2 * 4 * mask.num_selected
    assert pickle.loads(pickle.dumps(mask)) == mask
