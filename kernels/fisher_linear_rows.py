"""A linear layer of which every row is a sample of its own, as after pooling or in an MLP.

    score[o, i] += sum_r f( grad[r, o] x[r, i] ) = sum_r f(grad[r, o]) f(x[r, i])

f, the square or the absolute value, factors: the sum over samples is one matrix product, of
operands to which f is applied in registers. Rows may be divided among programs. Deterministic.
"""

# mypy: disallow-untyped-defs=False
# The arguments of kernels get their types at the launch.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import fp32_precision
from .linear_tile import Config, add_tile, launch_tiles, own_tile, side_of_tiles

__all__ = ["CONFIGS", "add_linear_rows", "rows_kernel"]

# By precision and the side of the tile. Squaring takes registers too, too many for a large ieee.
CONFIGS = {
    ("tf32", 128): Config(128, 128, 32, 8, 3, 1),
    ("tf32", 64): Config(64, 64, 16, 4, 3, 4),
    ("ieee", 128): Config(64, 64, 16, 4, 3, 4),
    ("ieee", 64): Config(64, 64, 16, 4, 3, 4),
}


@triton.jit(do_not_specialize=["num_rows", "units_per_split"])
def rows_kernel(
    out_ptr,  # [splits, num_out, num_in] fp32: scratch, or the score itself
    grad_ptr,  # [num_rows, num_out]
    x_ptr,  # [num_rows, num_in]
    num_rows,
    units_per_split,  # in steps
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
    """Multiply f of the operands, over the rows of this split."""
    o, i = own_tile(num_out, num_in, BLOCK_O, BLOCK_I)
    first = tl.program_id(1).to(tl.int64) * units_per_split * BLOCK_T
    last = tl.minimum(first + units_per_split * BLOCK_T, num_rows)
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
    add_tile(out_ptr, total, o, i, num_out, num_in, stride_split, stride_o)


def add_linear_rows(
    score: Tensor, grad: Tensor, x: Tensor, power: int, bias: Tensor | None = None,
    bias_out: Tensor | None = None,
) -> None:  # fmt: skip
    """Add ``sum_r f(grad[r, o] x[r, i])`` to ``score[o, i]``, in place.

    Args:
        score: [O, I] fp32, any strides.
        grad: [N, O] fp32, bf16 or fp16.
        x: [N, I], of the same dtype.
        power: 2 (f squares) or 1 (f takes the absolute value).
        bias: [D] fp32, to which ``bias_out`` is added in the last launch; None: no bias.
        bias_out: [groups, D] fp32.
    """
    # Squares of bf16 and fp16 are multiplied as tf32: its rounding is finer than the one that the
    # operands have been through.
    precision = fp32_precision() if grad.dtype == torch.float32 else "tf32"
    config = CONFIGS[precision, side_of_tiles(score)]
    num_steps = triton.cdiv(len(grad), config.block_t)
    launch_tiles(
        rows_kernel, score, grad, x, config, num_steps, True, bias, bias_out,
        num_rows=len(grad), POWER=power, PRECISION=precision,
    )  # fmt: skip
