"""What this device does at its best, measured once in the run: copies, reads, matrix products."""

from __future__ import annotations

import functools

import torch
from clock import measure
from machine import full_size

__all__ = ["copy_bandwidth", "gemm_rate", "read_bandwidth", "roofline_us"]


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Return GB/s of a large copy, bytes read plus bytes written: every kernel's floor."""
    source = torch.ones(_many(device), device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device)
    return 2 * source.nbytes / timing["median_us"] / 1e3


@functools.cache
def read_bandwidth(device: torch.device) -> float:
    """Return GB/s of one large read: the sum of a tensor."""
    source = torch.ones(_many(device), device=device)
    timing = measure(source.sum, device)
    return source.nbytes / timing["median_us"] / 1e3


@functools.cache
def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return TFLOP/s of a large square matrix product of random numbers, by torch's library."""
    side = (8192 if device.type == "cuda" else 1024) if full_size() else 128
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = measure(lambda: left @ right, device)
    return 2 * side**3 / timing["median_us"] / 1e6


def _many(device: torch.device) -> int:
    """Return how many fp32 elements no cache holds; at toy size, few."""
    return (2**28 if device.type == "cuda" else 2**25) if full_size() else 2**20


def roofline_us(num_bytes: int, flops: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the time below which counted work cannot go on this device, measured in this run.

    Args:
        num_bytes: read plus written, at the bandwidth of a copy.
        flops: at the rate of a large matrix product; 0 leaves them out.
        device: where.
        dtype: of the product.
    """
    moving = num_bytes / copy_bandwidth(device) / 1e3
    return max(moving, flops / gemm_rate(device, dtype) / 1e6) if flops else moving
