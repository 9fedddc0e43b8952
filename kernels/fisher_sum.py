"""Per-sample squared gradients of biases and of the scales of norms.

    score[d] += sum_b f( sum_t grad[b, t, d] xhat[b, t, d] ),    f = square or abs
    xhat = (x - mean) rstd, or 1 for a bias

A norm's scale and shift go in one launch. Reads grad and x once. Strides are free: a channels-first
norm passes a transposed view, statistics are broadcast by strides of 0. Deterministic: programs
that share a feature write to scratch, which is summed in order.
"""

# mypy: disallow-untyped-defs=False
# The arguments of kernels get their types at the launch.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import divide_samples
from .splits import add_splits

__all__ = ["CONFIGS", "Config", "add_sum", "sum_kernel", "sums_of_groups"]


class Config(NamedTuple):
    """How the kernel is compiled: samples, positions and features per step, and warps."""

    block_b: int
    block_t: int
    block_d: int
    num_warps: int


# 4 values a thread: with more, the addresses of four operands crowd the registers. What hides the
# wait for memory is programs, several on each multiprocessor.
CONFIGS = {
    "features": Config(1, 16, 64, 8),
    # Positions are contiguous: few features, so that few samples still make many programs.
    "positions": Config(1, 64, 16, 8),
    "short": Config(4, 4, 64, 8),
}
_PROGRAMS_PER_SM = 4
# What a thread may have with two programs on a multiprocessor. Without this bound the assembler
# aims at more programs, and spills a few registers for it.
_MAX_REGISTERS = 128


@triton.jit
def _load(ptr, strides, b, t, d, mask):
    ptrs = ptr + b * strides[0] + t * strides[1] + d * strides[2]
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_samples", "samples_per_split", "num_positions", "power"])
def sum_kernel(
    out_ptr,  # [splits, num_features] fp32, of grad xhat
    bias_out_ptr,  # the same of grad alone
    grad_ptr,  # all [num_samples, num_positions, num_features], with strides
    x_ptr,
    mean_ptr,
    rstd_ptr,
    grad_strides,
    x_strides,
    mean_strides,
    rstd_strides,
    num_samples,
    samples_per_split,
    num_positions,
    num_features,
    power,
    HAS_X: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum f of each sample's sums over the samples of this split."""
    feature = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = feature[None, None, :]
    split = tl.program_id(1).to(tl.int64)
    first = split * samples_per_split
    last = tl.minimum(first + samples_per_split, num_samples)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    bias_total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for b0 in range(first, last, BLOCK_B):
        b = (b0 + tl.arange(0, BLOCK_B))[:, None, None]
        acc = tl.zeros((BLOCK_B, BLOCK_T, BLOCK_D), tl.float32)
        bias_acc = tl.zeros((BLOCK_B, BLOCK_T, BLOCK_D), tl.float32)
        for t0 in range(0, num_positions, BLOCK_T):
            t = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :, None]
            mask = (b < last) & (t < num_positions) & (d < num_features)
            grad = _load(grad_ptr, grad_strides, b, t, d, mask)
            if HAS_X:
                x = _load(x_ptr, x_strides, b, t, d, mask)
                if HAS_MEAN:
                    x -= _load(mean_ptr, mean_strides, b, t, d, mask)
                if HAS_RSTD:
                    x *= _load(rstd_ptr, rstd_strides, b, t, d, mask)
                acc += grad * x
            if HAS_BIAS:
                bias_acc += grad
        # Samples past the last one are f(0).
        if HAS_X:
            sums = tl.sum(acc, axis=1)
            total += sums * sums if power == 2 else tl.abs(sums)
        if HAS_BIAS:
            sums = tl.sum(bias_acc, axis=1)
            bias_total += sums * sums if power == 2 else tl.abs(sums)
    place = split * num_features + feature
    if HAS_X:
        tl.store(out_ptr + place, tl.sum(total, axis=0), mask=feature < num_features)
    if HAS_BIAS:
        tl.store(bias_out_ptr + place, tl.sum(bias_total, axis=0), mask=feature < num_features)


def add_sum(
    score: Tensor | None,
    grad: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    power: int,
    bias: Tensor | None = None,
) -> None:
    """Add ``sum_b f(sum_t grad[b, t, d] xhat[b, t, d])`` to ``score[d]``, in place.

    Args:
        score: [D] fp32; None: nothing is added.
        grad: [B, T, D], any strides.
        x: [B, T, D], any strides; None for a bias: xhat is 1, and mean and rstd are not looked at.
        mean: subtracted from x; None, or broadcastable to [B, T, D].
        rstd: x is multiplied by it after that; None, or broadcastable to [B, T, D].
        power: 2 (f squares) or 1 (f takes the absolute value).
        bias: [D] fp32, to which the same without xhat is added; None: no bias.
    """
    if grad.numel() == 0:
        return
    if x is None and score is not None and bias is not None:
        add_sum(score, grad, None, None, None, power)
        score = None
    if x is None or score is None:  # one sum, of the gradient alone
        vector = bias if score is None else score
        if vector is not None:
            _, out = sums_of_groups(grad, None, None, None, power, bias=True)
            assert out is not None
            add_splits(vector[None], out[:, None])
        return
    out, bias_out = sums_of_groups(grad, x, mean, rstd, power, bias=bias is not None)
    assert out is not None
    add_splits(score[None], out[:, None], bias, bias_out)


def sums_of_groups(
    grad: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    power: int,
    bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return what `add_sum` adds, for each group of samples.

    Args:
        grad: [B, T, D], not empty; and so on as `add_sum` has them.
        x: of the score; None: no score.
        mean: of the score.
        rstd: of the score.
        power: 2 or 1.
        bias: whether the sums of ``grad`` alone are wanted.

    Returns:
        The sums for the score and for the bias, [groups, D] fp32; None where not wanted.
    """
    num_samples, num_positions, num_features = grad.shape
    if num_positions < 8:
        config = CONFIGS["short"]
    elif num_positions >= 64 and grad.stride(1) == 1 and grad.stride(2) != 1:
        config = CONFIGS["positions"]
    else:
        config = CONFIGS["features"]
    tiles = triton.cdiv(num_features, config.block_d)
    splits, units = divide_samples(
        grad.device, triton.cdiv(num_samples, config.block_b), tiles, _PROGRAMS_PER_SM
    )
    shape = splits, num_features
    out = None if x is None else grad.new_empty(shape, dtype=torch.float32)
    bias_out = grad.new_empty(shape, dtype=torch.float32) if bias else None
    # The kernel has no branch for what is missing; grad stands in for it, unread.
    operands = [grad if tensor is None else tensor.expand_as(grad) for tensor in (x, mean, rstd)]
    with torch.cuda.device_of(grad):
        sum_kernel[tiles, splits](
            out_ptr=grad if out is None else out,
            bias_out_ptr=grad if bias_out is None else bias_out,
            grad_ptr=grad,
            x_ptr=operands[0],
            mean_ptr=operands[1],
            rstd_ptr=operands[2],
            grad_strides=grad.stride(),
            x_strides=operands[0].stride(),
            mean_strides=operands[1].stride(),
            rstd_strides=operands[2].stride(),
            num_samples=num_samples,
            samples_per_split=units * config.block_b,
            num_positions=num_positions,
            num_features=num_features,
            power=power,
            HAS_X=x is not None,
            HAS_MEAN=mean is not None,
            HAS_RSTD=rstd is not None,
            HAS_BIAS=bias,
            BLOCK_B=config.block_b,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            maxnreg=_MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return out, bias_out
