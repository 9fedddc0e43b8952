"""What groups of samples have summed, added to the scores in one launch and in a fixed order."""

# mypy: disallow-untyped-defs=False
# The arguments of kernels get their types at the launch.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "NUM_WARPS", "add_splits", "splits_kernel"]

BLOCK = 512  # of 1024 each thread's addresses spill
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_splits", "num_bias_splits"])
def splits_kernel(
    score_ptr,
    out_ptr,  # [num_splits, rows, columns] fp32
    bias_ptr,
    bias_out_ptr,  # [num_bias_splits, num_bias] fp32
    num_splits,
    num_bias_splits,
    num_rows,  # of the score
    num_columns,
    num_bias,
    score_stride_o,
    score_stride_i,
    out_stride_split,
    out_stride_o,
    bias_stride,
    bias_out_stride,
    BLOCK: tl.constexpr,
):
    """Add the groups of a block of the score, or of the bias, which the last programs have."""
    own = tl.program_id(0).to(tl.int64)
    size = tl.full((), 1, tl.int64) * num_rows * num_columns
    blocks = tl.cdiv(size, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if own < blocks:
        n = own * BLOCK + tl.arange(0, BLOCK)
        o = n // num_columns
        i = n % num_columns
        for s in range(num_splits):
            split = tl.full((), 1, tl.int64) * s
            source = out_ptr + split * out_stride_split + o * out_stride_o + i
            total += tl.load(source, mask=n < size, other=0.0)
        target = score_ptr + o * score_stride_o + i * score_stride_i
        tl.store(target, tl.load(target, mask=n < size, other=0.0) + total, mask=n < size)
    else:
        n = (own - blocks) * BLOCK + tl.arange(0, BLOCK)
        for s in range(num_bias_splits):
            split = tl.full((), 1, tl.int64) * s
            source = bias_out_ptr + split * bias_out_stride + n
            total += tl.load(source, mask=n < num_bias, other=0.0)
        target = bias_ptr + n * bias_stride
        tl.store(target, tl.load(target, mask=n < num_bias, other=0.0) + total, mask=n < num_bias)


def add_splits(
    score: Tensor, out: Tensor, bias: Tensor | None = None, bias_out: Tensor | None = None
) -> None:
    """Add the sums over the groups to a score, and to a bias, in place.

    Args:
        score: [O, I] fp32, any strides.
        out: [splits, at least O, at least I] fp32, unit last stride.
        bias: [D] fp32, any stride; None: no bias.
        bias_out: [splits, at least D] fp32, unit last stride.
    """
    num_bias = 0 if bias is None else bias.shape[0]
    blocks = triton.cdiv(score.numel(), BLOCK) + triton.cdiv(num_bias, BLOCK)
    # The score stands in for a bias of no elements.
    bias, bias_out = (score, out) if bias is None or bias_out is None else (bias, bias_out)
    with torch.cuda.device_of(score):
        splits_kernel[blocks,](
            score_ptr=score,
            out_ptr=out,
            bias_ptr=bias,
            bias_out_ptr=bias_out,
            num_splits=len(out),
            num_bias_splits=len(bias_out),
            num_rows=score.shape[0],
            num_columns=score.shape[1],
            num_bias=num_bias,
            score_stride_o=score.stride(0),
            score_stride_i=score.stride(1),
            out_stride_split=out.stride(0),
            out_stride_o=out.stride(1),
            bias_stride=bias.stride(0),
            bias_out_stride=bias_out.stride(0),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
