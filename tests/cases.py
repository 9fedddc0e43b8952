"""Shapes, sizes, dtypes and values that the tests go through, with readable ids."""

from __future__ import annotations

import pytest
import torch

CHUNK = 2**16  # csrc/topk_mask_cpu.cpp: scores per chunk of work

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]

# Sizes of the tensors of one model.
SIZES = [
    pytest.param([1], id="one-weight"),
    pytest.param([31, 32, 33], id="around-a-warp"),
    pytest.param([0, 7, 0, 0, 5, 0], id="empty-among-others"),
    pytest.param([1, 1, 1, 1], id="scalars"),
    pytest.param([997, 2, 10007], id="primes"),
    pytest.param([CHUNK - 1], id="chunk-1"),
    pytest.param([CHUNK], id="chunk"),
    pytest.param([CHUNK + 1], id="chunk+1"),
    pytest.param([2 * CHUNK, 3 * CHUNK], id="chunks"),
    pytest.param([3, CHUNK + 1, 0, CHUNK - 1, 1], id="chunks-and-crumbs"),
]


def _random(n):
    return torch.rand(n)


def _few_values(n):
    return torch.randint(0, 5, (n,)).float()


def _all_equal(n):
    return torch.full((n,), 0.3)


def _all_zero(n):
    return torch.zeros(n)


def _mostly_zero(n):
    return torch.rand(n) * (torch.rand(n) < 0.05)


def _signed_zeros(n):
    return torch.zeros(n).copysign(torch.rand(n) - 0.5)


def _denormals(n):
    return torch.randint(0, 50, (n,), dtype=torch.int32).view(torch.float32)


def _infinities(n):
    return torch.where(torch.rand(n) < 0.3, torch.inf, torch.rand(n))


def _one_bin(n):
    """All scores share the upper 16 bits: the first digit tells nothing."""
    return (torch.randint(0, 2**16, (n,), dtype=torch.int32) + 0x3F800000).view(torch.float32)


def _bin_edges(n):
    """Neighbours across a border of the first digit: 0x3f80ffff and 0x3f810000."""
    return (torch.randint(-1, 1, (n,), dtype=torch.int32) + 0x3F810000).view(torch.float32)


def _wide(n):
    """Every exponent there is."""
    return torch.randint(0, 0x7F800001, (n,), dtype=torch.int64).to(torch.int32).view(torch.float32)


VALUES = [
    pytest.param(make, id=make.__name__.strip("_").replace("_", "-"))
    for make in (
        _random, _few_values, _all_equal, _all_zero, _mostly_zero, _signed_zeros, _denormals,
        _infinities, _one_bin, _bin_edges, _wide,
    )
]  # fmt: skip
