"""What the two kernels of a linear layer share: the tile that a program owns, and the launch."""

# mypy: disallow-untyped-defs=False
# The arguments of kernels get their types at the launch.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned_rows, divide_samples, misaligned
from .splits import add_splits

__all__ = ["Config", "add_tile", "launch_tiles", "own_tile", "put_tile", "side_of_tiles"]


class Config(NamedTuple):
    """How a kernel is compiled: the tile of the weight, rows per step, and resources."""

    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int
    tiles_per_sm: int


@triton.jit
def own_tile(num_out, num_in, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """Rows and columns of this program; programs that run together share operands in the cache."""
    tiles_o = tl.cdiv(num_out, BLOCK_O)
    tiles_i = tl.cdiv(num_in, BLOCK_I)
    tile = tl.program_id(0)
    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, 8)
    o = tile_o.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    return o, i


@triton.jit
def add_tile(out_ptr, value, o, i, num_out, num_in, stride_split, stride_o):
    """Add to the score, or to this split's part of the scratch, which begins as zeros."""
    put_tile(out_ptr, value, o, i, num_out, num_in, stride_split, stride_o, True)


@triton.jit
def put_tile(out_ptr, value, o, i, num_out, num_in, stride_split, stride_o, DIRECT: tl.constexpr):
    """Add to the score, or write this split's part of the scratch."""
    split = tl.program_id(1).to(tl.int64)
    ptrs = out_ptr + split * stride_split + o[:, None] * stride_o + i[None, :]
    mask = (o < num_out)[:, None] & (i < num_in)[None, :]
    if DIRECT:
        value += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, value, mask=mask)


def side_of_tiles(score: Tensor) -> int:
    """Return 128, or 64 for a weight that would leave half of such a tile empty."""
    return 128 if min(score.shape) > 64 else 64


def launch_tiles(
    kernel: Any,
    score: Tensor,
    grad: Tensor,
    x: Tensor,
    config: Config,
    num_units: int,
    adds: bool,
    bias: Tensor | None = None,
    bias_out: Tensor | None = None,
    **arguments: Any,
) -> None:
    """Run a kernel on every tile of the score, for every group of samples.

    Args:
        kernel: puts tiles in ``out_ptr``, whose sizes and strides are multiples of 16.
        score: [O, I], any strides.
        grad: [N, O].
        x: [N, I].
        config: of the kernel.
        num_units: how many samples, or steps of rows, can be given to different programs.
        adds: whether the kernel adds to its scratch, too; else it is told whether to add.
        bias: [D], whose sums are added in the last launch, too; None: no bias.
        bias_out: [any number of groups, D], its sums.
        arguments: what this kernel takes and the other does not.
    """
    (num_out, num_in), grad, x = score.shape, aligned_rows(grad), aligned_rows(x)
    tiles = triton.cdiv(num_out, config.block_o) * triton.cdiv(num_in, config.block_i)
    splits, units = divide_samples(score.device, num_units, tiles, config.tiles_per_sm)
    # Otherwise tiles go to scratch: as many as run at once, or one for each if the score's sizes or
    # strides are odd.
    direct = splits == 1 and score.shape == (grad.shape[1], x.shape[1]) and not misaligned(score)
    make = score.new_zeros if adds else score.new_empty
    out = score[None] if direct else make((splits, grad.shape[1], x.shape[1]))
    if not adds:
        arguments["DIRECT"] = direct
    with torch.cuda.device_of(score):
        kernel[tiles, splits](
            out_ptr=out,
            grad_ptr=grad,
            x_ptr=x,
            units_per_split=units,
            num_out=grad.shape[1],
            num_in=x.shape[1],
            stride_split=out.stride(0) if splits > 1 else 0,
            stride_o=out.stride(1),
            BLOCK_O=config.block_o,
            BLOCK_I=config.block_i,
            BLOCK_T=config.block_t,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
            **arguments,
        )
    if not direct:
        add_splits(score, out, bias, bias_out)
    elif bias is not None and bias_out is not None:
        add_splits(bias[None], bias_out[:, None])
