"""The shipped CUDA kernels csrc/topk_mask.cu, executed on the CPU, against numpy's stable sort.

`tests/test_topk_mask*.py` run the whole API on them (``backend="simulated"``), and
`tests/test_simt_kernels.py` the kernels under every schedule and sanitizer; here are the cases that
only kernels have: chains of tiles, small grids and cards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from cases import DTYPES, VALUES
from simt.library import SimtLibrary
from simt.topk_mask_backend import SimulatedTopk, install
from torch import Tensor

import fishfast as ff
from fishfast.mask.selection import cuda as module

# What the launcher decides, by the card and by k.
WAYS = {
    "stream": {"stream_capacity": 10**6},  # everything of interest is set aside
    "no-stream": {"stream_capacity": 0},  # three reads
    "small-card-stream": {"stream_capacity": 10**6, "max_shared_bytes": 48 * 1024},
    "small-card-no-stream": {"stream_capacity": 0, "max_shared_bytes": 48 * 1024},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)

Use = Callable[..., SimulatedTopk]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, topk_library: SimtLibrary) -> Use:
    """Install simulated kernels with other tiles, grids or cards."""
    topk_library.schedule(seed=0)

    def with_limits(scores_per_tile: int = 8192, **limits: int) -> SimulatedTopk:
        extension = SimulatedTopk(topk_library, scores_per_tile, **limits)
        install(monkeypatch, extension)
        return extension

    return with_limits


def named(sizes: list[int], make: Callable[[int], Tensor]) -> dict[str, Tensor]:
    return {f"t{i}": make(n) for i, n in enumerate(sizes)}


def check(scores: dict[str, Tensor], k: int) -> None:
    mask = ff.top_k_mask(scores, k=k, backend="simulated")
    for name, truth in oracle.top_k(scores, k).items():
        np.testing.assert_array_equal(mask[name].numpy(), truth, err_msg=f"{name}, k={k}")
    zeros = sum(int((scores[name][found.long()] == 0).sum()) for name, found in mask.items())
    assert mask.num_zero_score == zeros


@ways
@pytest.mark.parametrize("make", VALUES)
def test_values_over_many_tiles(make: Callable[[int], Tensor], way: dict[str, int], use: Use):
    use(scores_per_tile=100, **way)
    scores = named([31, 1009, 0, 2001], make)
    for k in (1, 15, 1000, 3040, 3041):
        check(scores, k)


@pytest.mark.parametrize("capacity", [10, 200, 1500])
def test_stream_that_is_just_large_enough_or_not(capacity: int, use: Use):
    """Around the k at which a third read begins, nothing is lost and nothing overruns."""
    use(scores_per_tile=64, stream_capacity=capacity)
    scores = {"few": torch.randint(0, 9, (2000,)).float() / 8 + 0.7, "t": torch.rand(77)}
    above = int((scores["few"] > 1).sum())
    for k in {1, capacity - 1, capacity, capacity + 1, above, above + 1}:
        check(scores, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limits", [{}, {"max_shared_bytes": 48 * 1024}], ids=["wide", "narrow"])
def test_one_dtype_alone(dtype: torch.dtype, limits: dict[str, int], use: Use):
    use(scores_per_tile=1000, **limits)
    scores = {"w": torch.rand(4999).to(dtype), "ties": torch.full((500,), 0.5, dtype=dtype)}
    for k in (1, 50, 2500, 5499):
        check(scores, k)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 8191, 8192, 8193, 2**16 - 1, 2**16, 2**16 + 1])
def test_sizes_around_warps_tiles_and_turns(n: int, use: Use):
    use()
    scores = {"w": torch.randint(0, 1000, (n,)).float()}
    for k in {1, n // 200 + 1, n}:
        check(scores, k)


def test_every_k(use: Use):
    use(scores_per_tile=7)
    scores = named([5, 0, 1, 13, 40], lambda n: torch.randint(0, 4, (n,)).float())
    for k in range(1, 60):
        check(scores, k)


def test_many_tiny_and_empty_tensors(use: Use):
    use(stream_capacity=1000)
    scores = named([1, 3, 0, 4, 0] * 200, lambda n: torch.randint(0, 50, (n,)).float())
    for k in (1, 300, 1600):
        check(scores, k)


@pytest.mark.parametrize("max_blocks", [1, 2, 5])
def test_counters_of_sixteen_bits_do_not_overflow(max_blocks: int, use: Use):
    """One block counts more than 2^16 of each of two values that share a word."""
    use(max_blocks=max_blocks, stream_capacity=0)
    step = 2.0**-7  # neighbours in the first digit
    scores = {"w": 1 + step * (torch.arange(150_000) % 2)}
    scores["w"][70_000:140_000] = 1.0
    check(scores, 40_000)
    check(scores, 100_000)


def test_indices_of_two_widths(use: Use, monkeypatch: pytest.MonkeyPatch):
    """As with a tensor of 2^31 scores, whose indices are int64, beside smaller ones."""

    def index_dtype(numel: int) -> torch.dtype:
        return torch.int64 if numel > 500 else torch.int32

    monkeypatch.setattr(module, "index_dtype", index_dtype)
    use(scores_per_tile=64)
    scores = named([300, 900, 1, 0, 700, 20], torch.rand)
    found, _ = module.select_cuda(list(scores), list(scores.values()), 500)
    truth = oracle.top_k(scores, 500)
    for (name, score), indices in zip(scores.items(), found, strict=True):
        assert indices.dtype == index_dtype(score.numel())
        np.testing.assert_array_equal(indices.numpy(), truth[name])


@pytest.mark.parametrize("reverse", [False, True])
def test_first_bad_score_is_named_and_nothing_is_selected(
    reverse: bool, use: Use, topk_library: SimtLibrary
):
    extension = use(scores_per_tile=32)
    scores = named([100, 900, 900], torch.rand)
    for bad in (torch.nan, -1.0, -torch.inf):
        scores["t1"][[333, 334, 899]] = scores["t2"][0] = bad
        topk_library.schedule(seed=3, resident_blocks=3, reverse=reverse)
        with pytest.raises(ValueError, match=f"got {bad} at flat index 333 of 't1'"):
            ff.top_k_mask(scores, k=20, backend="simulated")
    flat = torch.full((20,), -7, dtype=torch.int32)
    assert module._launch(list(scores.values()), 20, flat) == [1, 333, 0, 0, 0, 0]
    assert (flat == -7).all()
    assert extension.num_calls == 4
