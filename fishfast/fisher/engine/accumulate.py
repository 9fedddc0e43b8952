"""Per-sample squared gradients of one weight, added to its scores: plain torch, tuned for the CPU.

With f the square (``power=2``) or the absolute value (``power=1``), every function adds

    score += sum_b f( gradient of sample b )

to ``score`` (fp32, any device) in place. The sum over a sample's positions comes before f; fp32
products and sums whatever the operands' dtype; no float atomics, so that the same input gives the
same scores. B x |theta| values are never held: what is held at once fits a CPU's caches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fishfast.fisher.engine.accumulate_conv import add_conv
from fishfast.fisher.engine.accumulate_linear import add_linear
from fishfast.fisher.engine.power import add_samples, power_function
from fishfast.fisher.engine.rows import bounds_of_blocks

__all__ = ["add_blocks", "add_blocks_by", "add_conv", "add_embedding", "add_linear", "add_sum"]

# fp32 values (2 MB) of a norm's products that are held at once.
_HELD = 2**19
# fp32 values (32 MB) of an embedding's rows. Adding to fewer than all columns of a row is slow, so
# that only large batches are split, and never in fewer columns than these.
_EMBEDDED, _COLUMNS = 2**23, 1024


def add_blocks(
    score: Tensor, bias: Tensor | None, grad: Tensor, x: Tensor, bias_of_x: bool, power: int
) -> None:
    """Add a linear layer's weight and bias, samples of one length.

    Args:
        score: [O, I] fp32, any strides.
        bias: [O] fp32, to which the f's of ``sum_t grad[b, t, o]`` are added; None: no bias.
        grad: [B, T, O], fp32, bf16 or fp16, any strides.
        x: [B, T, I], as ``grad``.
        bias_of_x: whether the bias is [I], of ``x``, where a weight stored transposed swaps both.
        power: 2 or 1.
    """
    add_blocks_by(add_linear, add_sum, score, bias, grad, x, bias_of_x, power)


def add_blocks_by(
    add_linear: Callable[..., None], add_sum: Callable[..., None], score: Tensor,
    bias: Tensor | None, grad: Tensor, x: Tensor, bias_of_x: bool, power: int,
) -> None:  # fmt: skip
    """Do what `add_blocks` does, by the sums of a backend for packed rows and for biases."""
    output = x if bias_of_x else grad  # the gradient of the layer's output
    if bias is not None:
        add_sum(None, output, None, None, None, power, bias)
    bounds = (None, None) if grad.shape[1] == 1 else bounds_of_blocks(output)
    grad, x = (t.flatten(0, 1) for t in (grad, x))
    grad, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, x))
    add_linear(score, grad, x, *bounds, power)


def add_sum(
    score: Tensor | None,
    grad: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    power: int,
    bias: Tensor | None = None,
) -> None:
    """Add ``sum_b f( sum_t grad[b, t, d] ((x - mean) rstd)[b, t, d] )`` to ``score[d]``.

    Args:
        score: [D] fp32; None: nothing is added.
        grad: [B, T, D], any strides.
        x: [B, T, D], any strides; None: the sum of ``grad`` alone.
        mean: broadcastable to [B, T, D]; None: 0.
        rstd: broadcastable to [B, T, D]; None: 1.
        power: 2 or 1.
        bias: [D] fp32, to which the f's of ``sum_t grad[b, t, d]`` are added; None: no bias.
    """
    if grad.numel() == 0:
        return
    mean, rstd = (None if t is None else t.expand(grad.shape) for t in (mean, rstd))
    step = max(1, _HELD // grad[0].numel())
    for start in range(0, len(grad), step):
        chunk = slice(start, start + step)
        product = grad[chunk].float()
        if bias is not None:
            add_samples(bias, product.sum(1), power)
        if score is None:
            continue
        if x is not None:
            centred = x[chunk].float() if mean is None else x[chunk].float() - mean[chunk]
            product = product * centred
            if rstd is not None:
                product *= rstd[chunk]
        add_samples(score, product.sum(1), power)


def add_embedding(score: Tensor, tokens: Tensor, samples: Tensor, grad: Tensor, power: int) -> None:
    """Sum rows of equal (token, sample), apply f, and add the sums of equal tokens to ``score``.

    Both sums are taken in order: the rows of a (token, sample), then the samples of a token.

    Args:
        score: [V, D] fp32.
        tokens: [N] int64.
        samples: [N] int64, the sample of every row.
        grad: [N, D], fp32, bf16 or fp16.
        power: 2 or 1.
    """
    if grad.numel() == 0:
        return
    pairs, order = torch.sort((tokens << 32) + samples, stable=True)
    pairs, pair_starts = _runs(pairs)
    used, token_starts = _runs(pairs >> 32)
    f = power_function(power)
    in_order = torch.arange(len(pairs), device=pairs.device)
    width = max(_COLUMNS, _EMBEDDED // len(tokens))
    for part, rows in zip(score.split(width, 1), grad.split(width, 1), strict=True):
        # Sums of bags: gathers and adds in one pass, each bag in order.
        sums = F.embedding_bag(order, rows.float(), pair_starts, mode="sum")
        sums = F.embedding_bag(in_order, f(sums, out=sums), token_starts, mode="sum")
        part.index_add_(0, used, sums)  # every token once: no order to depend on


def _runs(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value and the first position of every run of equal keys."""
    values, lengths = torch.unique_consecutive(keys, return_counts=True)
    return values, lengths.cumsum(0) - lengths
