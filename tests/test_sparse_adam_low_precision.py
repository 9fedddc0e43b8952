"""ff.AdamW on weights of 16 bits: fp32 masters, and torch's rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepping import (
    BACKENDS,
    gradients_over_time,
    random_tensors,
    same_bits,
    some_indices,
    steps_of_ours,
    tune,
)
from torch import Tensor

import fishfast as ff


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_follow_fp32_masters(dtype: torch.dtype, backend: str) -> None:
    weights = [w.to(dtype) for w in random_tensors((33, 7), (101,))]
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=6)
    low = tune(weights, indices)
    full = tune([w.float() for w in weights], indices)
    options: dict[str, Any] = {"lr": 1e-3, "backend": backend}
    low_optimizer = ff.AdamW(low.parameters(), **options)
    full_optimizer = ff.AdamW(full.parameters(), **options)
    for gradients in series:
        steps_of_ours(low, low_optimizer, [gradients])
        steps_of_ours(full, full_optimizer, [gradients])
        for (name, ours), theirs in zip(low.named_parameters(), full.parameters(), strict=True):
            assert ours.dtype == torch.float32
            assert same_bits(ours, theirs)  # the masters are exactly the fp32 run
            name = name.removesuffix("_values")
            weight = low.model._parameters[name].detach().flatten()
            found = low.mask[name].long()
            assert same_bits(weight[found], ours.detach().to(dtype))
            untouched = torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, found, False)
            original = weights[int(name[1:])].flatten()
            assert same_bits(weight[untouched], original[untouched])


def scatter(masters: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Let a step with lr 0 write chosen masters into weights of a dtype."""
    tuned = tune([torch.zeros(masters.numel(), dtype=dtype)], [torch.arange(masters.numel())])
    (values,) = tuned.parameters()
    values.data.copy_(masters)
    steps_of_ours(
        tuned, ff.AdamW(tuned.parameters(), lr=0.0, backend=backend), [[torch.zeros_like(masters)]]
    )
    assert same_bits(values, masters) or masters.isnan().any()
    return tuned.model.w0.detach()


def assert_casts_agree(ours: Tensor, expected: Tensor) -> None:
    # torch itself has two bit patterns for a bf16 NaN, in its vector and its scalar loop.
    assert torch.equal(ours.isnan(), expected.isnan())
    assert same_bits(ours[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestConversions:
    def test_every_16_bit_pattern_comes_back(self, dtype: torch.dtype, backend: str) -> None:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
        assert_casts_agree(scatter(patterns.float(), dtype, backend), patterns)

    def test_random_fp32_bit_patterns(self, dtype: torch.dtype, backend: str) -> None:
        bits = torch.randint(-(2**31), 2**31, (400_000,)).int()
        assert_casts_agree(
            scatter(bits.view(torch.float32), dtype, backend), bits.view(torch.float32).to(dtype)
        )

    def test_halfway_cases(self, dtype: torch.dtype, backend: str) -> None:
        # Every value midway between two neighbours, and one fp32 step to either side of it.
        patterns = torch.arange(0, 2**15, dtype=torch.int32).short().view(dtype).double()
        patterns = patterns[patterns.isfinite()]
        middle = ((patterns[1:] + patterns[:-1]) / 2).float()
        assert torch.equal(middle.double(), (patterns[1:] + patterns[:-1]) / 2)
        around = torch.cat([
            middle,
            torch.nextafter(middle, torch.tensor(torch.inf)),
            torch.nextafter(middle, torch.tensor(0.0)),
        ])  # fmt: skip
        largest = torch.tensor(torch.finfo(dtype).max)
        edge = [
            torch.nextafter(largest, torch.tensor(torch.inf)),
            largest * 1.0009,
            largest * 1.001,
        ]
        masters = torch.cat([around, -around, torch.stack(edge)])
        assert_casts_agree(scatter(masters, dtype, backend), masters.to(dtype))
