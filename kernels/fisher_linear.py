"""Per-sample squared weight gradients of a linear layer, summed over the samples in one kernel.

    score[o, i] += sum_b f( sum_{r in sample b} grad[r, o] x[r, i] ),    f = square or abs

It is the weight-gradient matrix product with f between the sum over a sample's rows and the sum over
samples: the same FLOPs, and the B x |weight| gradients exist only a tile at a time, in registers. A
program owns a tile of the weight and walks through all samples, or a group of them where there are
few tiles; the rows of one sample are never divided, because f is not linear. Each operand is read
once per tile of the other, the score once. Deterministic: no atomics, a fixed order of sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishfast.kernels.launch import aligned_rows, divide_samples, fp32_precision, misaligned

__all__ = [
    "ROWS_CONFIGS",
    "SAMPLES_CONFIGS",
    "Config",
    "add_linear",
    "rows_kernel",
    "samples_kernel",
]


class Config(NamedTuple):
    """How a kernel is compiled: the tile of the weight, rows per step, and resources."""

    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int
    tiles_per_sm: int


# By the kind of product and the side of the tile, steps in falling length. 128x128 with 8 warps: a
# product and a running sum of f take half the registers; 4 warps or a wider tile would spill. 3
# stages of 32 KB also fit the 99 KB of consumer cards.
SAMPLES_CONFIGS = {
    ("half", 128): [Config(128, 128, 64, 8, 3, 1), Config(128, 128, 32, 8, 3, 1)],
    ("half", 64): [Config(64, 64, 64, 4, 3, 4)],
    ("tf32", 128): [Config(128, 128, 32, 8, 3, 1)],
    ("tf32", 64): [Config(64, 64, 32, 4, 3, 4)],
    # No tensor cores: 16 rows are a long step, and a longer one would waste rows of short samples.
    ("ieee", 128): [Config(128, 128, 16, 8, 3, 1)],
    ("ieee", 64): [Config(64, 64, 16, 4, 3, 4)],
}
# Both operands are squared in registers, which leaves too few for ieee's large tile.
ROWS_CONFIGS = {
    ("tf32", 128): Config(128, 128, 32, 8, 3, 1),
    ("tf32", 64): Config(64, 64, 16, 4, 3, 4),
    ("ieee", 128): Config(64, 64, 16, 4, 3, 4),
    ("ieee", 64): Config(64, 64, 16, 4, 3, 4),
}


@triton.jit
def _tile(num_out, num_in, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """Rows and columns of this program's tile; programs that run together share operands."""
    tiles_o = tl.cdiv(num_out, BLOCK_O)
    tiles_i = tl.cdiv(num_in, BLOCK_I)
    tile = tl.program_id(0)
    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, 8)
    o = tile_o.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    return o, i


@triton.jit
def _add_tile(out_ptr, value, o, i, num_out, num_in, stride_split, stride_o):
    split = tl.program_id(1).to(tl.int64)
    ptrs = out_ptr + split * stride_split + o[:, None] * stride_o + i[None, :]
    mask = (o < num_out)[:, None] & (i < num_in)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + value, mask=mask)


# What changes from batch to batch compiles nothing anew.
@triton.jit(
    do_not_specialize=["starts_ptr", "ends_ptr", "num_samples", "samples_per_split", "power"]
)
def samples_kernel(
    out_ptr,  # [splits, num_out, num_in] fp32: scratch, or the score itself
    grad_ptr,  # [rows, num_out]
    x_ptr,  # [rows, num_in]
    starts_ptr,  # [num_samples] int64, first row of each sample
    ends_ptr,  # [num_samples] int64, one past its last row
    num_samples,
    samples_per_split,
    num_out,  # a multiple of 16, and so are the next three
    num_in,
    stride_split,
    stride_o,
    power,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum f of the product of each sample's rows over the samples of this split."""
    o, i = _tile(num_out, num_in, BLOCK_O, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    first = tl.program_id(1).to(tl.int64) * samples_per_split
    last = tl.minimum(first + samples_per_split, num_samples)

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
    _add_tile(out_ptr, total, o, i, num_out, num_in, stride_split, stride_o)


@triton.jit(do_not_specialize=["num_rows", "rows_per_split"])
def rows_kernel(
    out_ptr,  # [splits, num_out, num_in] fp32: scratch, or the score itself
    grad_ptr,  # [num_rows, num_out]
    x_ptr,  # [num_rows, num_in]
    num_rows,
    rows_per_split,
    num_out,  # a multiple of 16, and so are the next three
    num_in,
    stride_split,
    stride_o,
    POWER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Every row a sample: f factors, and the sum over samples is the matrix product itself."""
    o, i = _tile(num_out, num_in, BLOCK_O, BLOCK_I)
    first = tl.program_id(1).to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for row in range(first, last, BLOCK_T):
        rows = (row + tl.arange(0, BLOCK_T))[:, None]
        mask_g = (rows < last) & (o < num_out)[None, :]
        mask_a = (rows < last) & (i < num_in)[None, :]
        g = tl.load(grad_ptr + rows * num_out + o[None, :], mask=mask_g, other=0.0)
        a = tl.load(x_ptr + rows * num_in + i[None, :], mask=mask_a, other=0.0)
        if POWER == 2:
            g = g.to(tl.float32) * g.to(tl.float32)
            a = a.to(tl.float32) * a.to(tl.float32)
        else:  # exact in the operands' own dtype
            g = tl.abs(g)
            a = tl.abs(a)
        total = tl.dot(tl.trans(g), a, total, input_precision=PRECISION)
    _add_tile(out_ptr, total, o, i, num_out, num_in, stride_split, stride_o)


def add_linear(
    score: Tensor, grad: Tensor, x: Tensor, starts: Tensor | None, ends: Tensor | None, power: int
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
    """
    num_samples = len(grad) if starts is None else len(starts)
    if score.numel() == 0 or len(grad) == 0 or num_samples == 0:
        return
    if score.stride(1) != 1 and score.stride(0) == 1:
        score, grad, x = score.T, x, grad  # the same sum, with the contiguous dim last
    (num_out, num_in), grad, x = score.shape, aligned_rows(grad), aligned_rows(x)

    # Products of bf16 and fp16 ignore the precision; squares of them are multiplied as tf32, whose
    # rounding is finer than the one that the operands have been through.
    single = grad.dtype == torch.float32
    precision = fp32_precision() if single else "tf32"
    side = 128 if min(num_out, num_in) > 64 else 64
    if starts is None:
        config = ROWS_CONFIGS[precision, side]
    else:
        # A step longer than the sample multiplies zeros; short steps pay their overhead more often.
        configs = SAMPLES_CONFIGS[precision if single else "half", side]
        fits = [c for c in configs if c.block_t < 1.5 * len(grad) / num_samples]
        config = (fits or configs[-1:])[0]
    tiles = triton.cdiv(num_out, config.block_o) * triton.cdiv(num_in, config.block_i)
    unit = config.block_t if starts is None else 1  # rows or samples that stay together
    splits, units = divide_samples(
        score.device, triton.cdiv(num_samples, unit), tiles, config.tiles_per_sm
    )

    # Elsewhere tiles go to scratch: no more of them than run at once, unless the score's sizes are
    # odd, when it is held twice.
    direct = splits == 1 and score.shape == (grad.shape[1], x.shape[1]) and not misaligned(score)
    out = score[None] if direct else score.new_zeros(splits, grad.shape[1], x.shape[1])
    arguments = {
        "out_ptr": out,
        "grad_ptr": grad,
        "x_ptr": x,
        "num_out": grad.shape[1],
        "num_in": x.shape[1],
        "stride_split": out.stride(0) if splits > 1 else 0,
        "stride_o": out.stride(1),
        "PRECISION": precision,
        "BLOCK_O": config.block_o,
        "BLOCK_I": config.block_i,
        "BLOCK_T": config.block_t,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(score):
        if starts is None:
            rows_kernel[tiles, splits](
                num_rows=num_samples, rows_per_split=units * unit, POWER=power, **arguments
            )
        else:
            samples_kernel[tiles, splits](
                starts_ptr=starts,
                ends_ptr=ends,
                num_samples=num_samples,
                samples_per_split=units,
                power=power,
                **arguments,
            )
    if not direct:
        score += (out.sum(0) if splits > 1 else out[0])[:num_out, :num_in]
