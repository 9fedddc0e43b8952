"""`top_k_mask` on a card: the same mask as on the CPU, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DTYPES, VALUES
from torch import Tensor

import fishfast as ff
from fishfast.mask.selection import cuda as module

pytestmark = pytest.mark.gpu

TILE = 8192  # csrc/launch.h, kTopkScoresPerTile
SIZES = [1, 31, 0, 33, TILE - 1, TILE, TILE + 1, 2**16 + 1, 1_000_003, 7]


def named(sizes: list[int], make: Callable[[int], Tensor], dtype=torch.float32):
    return {f"t{i}": make(n).to(dtype) for i, n in enumerate(sizes)}


def on_card(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: score.cuda() for name, score in scores.items()}


def check(scores: dict[str, Tensor], k: int, **rules) -> None:
    got = ff.top_k_mask(on_card(scores), k=k, backend="cuda", **rules)
    expected = ff.top_k_mask(scores, k=k, backend="cpu", **rules)
    assert got.num_zero_score == expected.num_zero_score
    for name in scores:
        assert got[name].is_cuda
        assert got[name].dtype == expected[name].dtype
        assert torch.equal(got[name].cpu(), expected[name]), (name, k)


def test_auto_takes_the_kernels():
    assert ff.build_info()["operations"]["topk_mask"]["cuda"] == "cuda"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", VALUES)
def test_values_and_budgets(make: Callable[[int], Tensor], dtype: torch.dtype):
    scores = named(SIZES, make, dtype)
    n = sum(SIZES)
    for k in (1, 2, n // 10_000, n // 200, n // 32, n // 10, n // 2, n - 1, n):
        check(scores, k)


def test_mixed_dtypes_and_layouts():
    scores = {
        "fp32": torch.rand(300, 401).T,
        "bf16": torch.rand(70_001).bfloat16(),
        "fp16": torch.rand(1000, 50).half()[:, ::3],
        "offset": torch.rand(9001).bfloat16()[1:],
    }
    for k in (1, 1000, 100_000):
        check(scores, k)
    check(scores, 500, scope="layer")


def test_one_hundred_runs_are_equal():
    """Whoever of the blocks comes first."""
    scores = on_card(named([3_000_000, 100, 2_000_000], VALUES[1].values[0]))
    expected = ff.top_k_mask(scores, density=0.3, backend="cuda")
    for _ in range(100):
        mask = ff.top_k_mask(scores, density=0.3, backend="cuda")
        assert all(torch.equal(mask[name], expected[name]) for name in scores)


def test_on_another_stream():
    """The kernels wait for what the caller's stream has still to compute."""
    host = torch.rand(4_000_000)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        scores = {"w": host.cuda(non_blocking=True) * 2}
        mask = ff.top_k_mask(scores, k=20_000, backend="cuda")
    assert torch.equal(mask["w"].cpu(), ff.top_k_mask({"w": host * 2}, k=20_000)["w"])


@pytest.mark.parametrize("capacity", [1, 64, 10**9], ids=["stream", "default-ish", "no-stream"])
def test_with_and_without_a_stream(capacity: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SCORES_PER_STREAM_ENTRY", capacity)
    scores = named([500_000, 300_001], torch.rand)
    for k in (1, 4000, 400_000, 800_001):
        check(scores, k)


def test_bad_score_is_named():
    scores = on_card(named([100, 2_000_000], torch.rand))
    scores["t1"][[777_777, 777_778, 1_999_999]] = torch.nan
    with pytest.raises(ValueError, match="got nan at flat index 777777 of 't1'"):
        ff.top_k_mask(scores, k=3, backend="cuda")


def test_ten_thousand_tiny_tensors():
    check(dict(named([1, 3, 0, 4] * 2500, lambda n: torch.randint(0, 7, (n,)).float())), 2000)


@pytest.mark.large
def test_more_than_2_to_the_32_scores():
    """An index past 2^31 is int64, and n and the ties do not wrap at 2^32."""
    n = 2**32 + 12_345
    scores = {
        "first": torch.zeros(5, device="cuda"),
        "big": torch.ones(n, dtype=torch.bfloat16, device="cuda"),
        "last": torch.ones(TILE + 1, device="cuda"),
    }
    scores["big"][[3, 2**31, n - 1]] = 2.0
    mask = ff.top_k_mask(scores, k=10, backend="cuda")
    assert mask["big"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2**31, n - 1]
    assert mask["big"].dtype == torch.int64
    assert mask["last"].dtype == torch.int32
    del mask
    scores["big"][: 2**32] = 0
    mask = ff.top_k_mask(scores, k=12_345 + TILE + 1 + 3, backend="cuda")
    # All that is not zero, and then zeros from the first tensor on.
    assert mask["first"].tolist() == [0, 1, 2]
    assert torch.equal(mask["big"], torch.arange(2**32, n, device="cuda"))
    assert mask["last"].numel() == TILE + 1
    assert mask.num_zero_score == 3
