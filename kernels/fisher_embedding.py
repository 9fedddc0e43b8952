"""Per-sample squared gradients of an embedding table.

    score[v, d] += sum_b f( sum_{rows r of sample b with token v} grad[r, d] ),    f = square or abs

Rows are sorted by token, then by sample. A program owns one token and a block of features: it walks
through the token's rows, adds up those of one sample, applies f where the sample changes, and alone
writes the token's row of the score. No atomics; rows of equal token and sample keep their order.
Reads grad once; of the score, the rows of the tokens that occur.
"""

# mypy: disallow-untyped-defs=False
# The arguments of kernels get their types at the launch.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK_D", "BLOCK_N", "NUM_WARPS", "add_embedding", "embedding_kernel"]

# Rows of one sample that are added up in a step. A token often has one, but token types have all.
BLOCK_N = 32
BLOCK_D = 64
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows", "power"])
def embedding_kernel(
    score_ptr,
    grad_ptr,
    keys_ptr,  # [num_rows] int64, ascending: token * 2**32 + sample
    order_ptr,  # [num_rows] int64, the row of grad that each key belongs to
    pair_ends_ptr,  # [num_rows] int64, one past the last equal key
    num_rows,
    num_features,
    score_stride_v,
    score_stride_d,
    grad_stride_n,
    grad_stride_d,
    power,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Score one token, in the program of its first row; the others have nothing to do."""
    begin = tl.program_id(0).to(tl.int64)
    token = tl.load(keys_ptr + begin) >> 32
    before = tl.load(keys_ptr + begin - 1, mask=begin > 0, other=-1) >> 32
    if token != before:
        d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), tl.float32)
        row = begin
        current = token
        while current == token:
            end = tl.load(pair_ends_ptr + row)
            acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            while row < end:
                n = row + tl.arange(0, BLOCK_N)
                source = tl.load(order_ptr + n, mask=n < end, other=0)
                grad = tl.load(
                    grad_ptr + source[:, None] * grad_stride_n + d[None, :] * grad_stride_d,
                    mask=(n < end)[:, None] & (d < num_features)[None, :],
                    other=0.0,
                )
                acc += grad.to(tl.float32)
                row += BLOCK_N
            sums = tl.sum(acc, axis=0)
            total += sums * sums if power == 2 else tl.abs(sums)
            row = end
            current = tl.load(keys_ptr + row, mask=row < num_rows, other=-1) >> 32
        ptrs = score_ptr + token * score_stride_v + d * score_stride_d
        score = tl.load(ptrs, mask=d < num_features, other=0.0)
        tl.store(ptrs, score + total, mask=d < num_features)


def add_embedding(score: Tensor, tokens: Tensor, samples: Tensor, grad: Tensor, power: int) -> None:
    """Add the per-sample scores of the rows that were looked up to ``score``, in place.

    Args:
        score: [V, D] fp32, any strides.
        tokens: [N] int64, the row of the table that each row of grad belongs to. The caller leaves
            out rows of the padding index.
        samples: [N] int64 >= 0 and below 2**32, the sample that each row of grad belongs to.
        grad: [N, D], gradient of what was looked up.
        power: 2 (f squares) or 1 (f takes the absolute value).
    """
    if grad.numel() == 0:
        return
    num_rows, num_features = grad.shape
    keys, order = torch.sort((tokens << 32) + samples, stable=True)
    pair_ends = torch.searchsorted(keys, keys, right=True)
    with torch.cuda.device_of(score):
        embedding_kernel[num_rows, triton.cdiv(num_features, BLOCK_D)](
            score_ptr=score,
            grad_ptr=grad,
            keys_ptr=keys,
            order_ptr=order,
            pair_ends_ptr=pair_ends,
            num_rows=num_rows,
            num_features=num_features,
            score_stride_v=score.stride(0),
            score_stride_d=score.stride(1),
            grad_stride_n=grad.stride(0),
            grad_stride_d=grad.stride(1),
            power=power,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
