"""Per-sample squared weight gradients of a linear layer, summed over the samples in one kernel.

    score[o, i] += sum_b f( sum_{r in sample b} grad[r, o] x[r, i] ),    f = square or abs

It is the weight-gradient matrix product, with f between the sum over a sample's rows and the sum
over samples: the same FLOPs, and the B x |weight| gradients exist only a tile at a time, in
registers. A program owns a tile of the weight and walks through all samples, or a group of them
where there are few tiles; the rows of one sample are never divided, because f is not linear. Each
operand is read once per tile of the other, the score once. Deterministic: no atomics, a fixed order
of sums.
"""

# mypy: disallow-untyped-defs=False
# The arguments of kernels get their types at the launch.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fisher_linear_rows import add_linear_rows
from .fisher_sum import sums_of_groups
from .launch import block_bounds, fp32_precision
from .linear_tile import Config, launch_tiles, own_tile, put_tile, side_of_tiles
from .splits import add_splits

__all__ = ["CONFIGS", "add_blocks", "add_linear", "samples_kernel"]

# By the kind of product and the side of the tile, steps in falling length. 128x128 with 8 warps: a
# product and a running sum of f take half the registers; 4 warps or a wider tile would spill. 3
# stages of 32 KB also fit the 99 KB of consumer cards.
CONFIGS = {
    ("half", 128): [Config(128, 128, 64, 8, 3, 1), Config(128, 128, 32, 8, 3, 1)],
    ("half", 64): [Config(64, 64, 64, 4, 3, 4)],
    ("tf32", 128): [Config(128, 128, 32, 8, 3, 1)],
    ("tf32", 64): [Config(64, 64, 32, 4, 3, 4)],
    # No tensor cores: 16 rows are a long step, and a longer one would waste rows of short samples.
    ("ieee", 128): [Config(128, 128, 16, 8, 3, 1)],
    ("ieee", 64): [Config(64, 64, 16, 4, 3, 4)],
}

# Multiply-adds of a product (some 30 us of an H200's tensor cores) from which it pays to look for
# padding, rows of zeros at a sample's end, which are then left out: that takes six launches.
_LONG = 2**33


# What changes from batch to batch compiles nothing anew.
@triton.jit(do_not_specialize=["starts_ptr", "ends_ptr", "num_samples", "units_per_split", "power"])
def samples_kernel(
    out_ptr,  # [splits, num_out, num_in] fp32: scratch, or the score itself
    grad_ptr,  # [rows, num_out]
    x_ptr,  # [rows, num_in]
    starts_ptr,  # [num_samples] int64, first row of each sample
    ends_ptr,  # [num_samples] int64, one past its last row
    num_samples,
    units_per_split,  # in samples
    num_out,  # a multiple of 16, and so are the next three
    num_in,
    stride_split,
    stride_o,
    power,
    PRECISION: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum f of the product of each sample's rows, over the samples of this split."""
    o, i = own_tile(num_out, num_in, BLOCK_O, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    first = tl.program_id(1).to(tl.int64) * units_per_split
    last = tl.minimum(first + units_per_split, num_samples)

    # One loop over the steps of all samples, not a loop in a loop: the pipeline of loads then runs
    # on from sample to sample, where it would drain after each (two steps of 64, at 128 rows).
    steps = tl.zeros((128,), tl.int64)
    for b in range(first, last, 128):
        lane = b + tl.arange(0, 128)
        start = tl.load(starts_ptr + lane, mask=lane < last, other=0)
        length = tl.load(ends_ptr + lane, mask=lane < last, other=0) - start
        # An empty sample takes a step too, which adds f(0).
        steps += tl.where(lane < last, tl.maximum(tl.cdiv(length, BLOCK_T), 1), 0)

    b = first
    row = tl.load(starts_ptr + b)
    end = tl.load(ends_ptr + b)
    product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for _ in range(tl.sum(steps, 0).to(tl.int32)):
        rows = (row + t)[:, None]
        mask_g = (rows < end) & (o < num_out)[None, :]
        mask_a = (rows < end) & (i < num_in)[None, :]
        g = tl.load(grad_ptr + rows * num_out + o[None, :], mask=mask_g, other=0.0)
        a = tl.load(x_ptr + rows * num_in + i[None, :], mask=mask_a, other=0.0)
        product = tl.dot(tl.trans(g), a, product, input_precision=PRECISION)
        # Apart from what follows the product, so that the next loads need not wait for it.
        row += BLOCK_T
        done = row >= end
        b += done.to(tl.int64)
        more = done & (b < last)
        row = tl.where(done, tl.load(starts_ptr + b, mask=more, other=0), row)
        end = tl.where(done, tl.load(ends_ptr + b, mask=more, other=0), end)
        if done:
            total += product * product if power == 2 else tl.abs(product)
            product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    put_tile(out_ptr, total, o, i, num_out, num_in, stride_split, stride_o, DIRECT)


def add_blocks(
    score: Tensor, bias: Tensor | None, grad: Tensor, x: Tensor, bias_of_x: bool, power: int
) -> None:
    """Add a linear layer's weight and bias, samples of one length, in three launches.

    Args:
        score: [O, I] fp32, any strides.
        bias: [O] fp32, to which f of the sums of ``grad`` is added; None: no bias.
        grad: [B, T, O] fp32, bf16 or fp16, any strides.
        x: [B, T, I], of the same dtype.
        bias_of_x: whether ``x`` is the gradient, and the bias [I]: a weight stored transposed.
        power: 2 or 1.
    """
    output = x if bias_of_x else grad
    if output.numel() == 0:
        return
    num_samples, length, _ = output.shape
    bias_out = None
    if bias is not None:
        _, bias_out = sums_of_groups(output, None, None, None, power, bias=True)
    starts: Tensor | None = None
    ends: Tensor | None = None
    if length > 1:
        starts, ends = block_bounds(num_samples, length, output.device)
        if grad.numel() * x.shape[2] >= _LONG:
            position = torch.arange(1, length + 1, device=output.device)
            ends = starts + (position * (output != 0).any(-1)).amax(1)
    if score.numel():
        left, right = grad.flatten(0, 1), x.flatten(0, 1)
        add_linear(score, left, right, starts, ends, power, bias, bias_out)
    elif bias is not None and bias_out is not None:
        add_splits(bias[None], bias_out[:, None])


def add_linear(
    score: Tensor,
    grad: Tensor,
    x: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    power: int,
    bias: Tensor | None = None,
    bias_out: Tensor | None = None,
) -> None:
    """Add ``sum_b f(sum_{r in b} grad[r, o] x[r, i])`` to ``score[o, i]``, in place.

    Args:
        score: [O, I] fp32, any strides; a weight stored transposed passes a transposed view.
        grad: [N, O] fp32, bf16 or fp16, gradient of the layer's output.
        x: [N, I], the layer's input, of the same dtype.
        starts: [B] int64, first row of each sample. None if every row is a sample of its own: f
            then factors, and the batch is one matrix product.
        ends: [B] int64, one past the last row of each sample; equal to its start if it is empty.
        power: 2 (f squares) or 1 (f takes the absolute value).
        bias: [D] fp32, to which ``bias_out`` is added in the last launch; None: no bias.
        bias_out: [groups, D] fp32.
    """
    num_samples = len(grad) if starts is None else len(starts)
    if score.numel() == 0 or len(grad) == 0 or num_samples == 0:
        return
    if score.stride(1) != 1 and score.stride(0) == 1:
        score, grad, x = score.T, x, grad  # the same sum, with the contiguous dim last
    if starts is None:
        add_linear_rows(score, grad, x, power, bias, bias_out)
        return

    single = grad.dtype == torch.float32
    precision = fp32_precision() if single else "tf32"  # which products of bf16 and fp16 ignore
    configs = CONFIGS[precision if single else "half", side_of_tiles(score)]
    # A step longer than the sample multiplies zeros; short steps pay their overhead more often.
    fits = [c for c in configs if c.block_t < 1.5 * len(grad) / num_samples]
    config = (fits or configs[-1:])[0]
    launch_tiles(
        samples_kernel, score, grad, x, config, num_samples, False, bias, bias_out,
        starts_ptr=starts, ends_ptr=ends, num_samples=num_samples, power=power, PRECISION=precision,
    )  # fmt: skip
