"""Per-sample squared gradients of a linear layer's weight, added to its scores: plain torch.

See accumulate.py for f and for what holds of all of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fishfast.fisher.engine.power import add_sample, add_samples, power_function

__all__ = ["SMALL_WEIGHT", "add_linear"]

# A large weight is scored in tiles of at most this many rows and columns: 4 MB of scores and 4 MB
# of one sample's gradient stay in the last-level cache while the samples pass; 2 to 10 % faster
# than whole weights. Thinner tiles, of the second-level cache's size, slow down the product.
_TILE = 1024
# Below this many elements one product is too short to pay for its call: samples go in batches.
SMALL_WEIGHT = 2**16
# fp32 values (2 MB) of such a batch's operands and gradients.
_HELD = 2**19
# Rows per product where every row is a sample: the squares of 16-bit rows are held in fp32.
_ROWS = 512


def add_linear(
    score: Tensor,
    grad: Tensor,
    x: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    power: int,
) -> None:
    """Add ``sum_b f( sum_{r in b} grad[r, o] x[r, i] )`` to ``score[o, i]``.

    Costs one product of the size of the weight's ordinary gradient, plus two passes over a cached
    tile per sample. A sample of one row costs no pass: f factors there.

    Args:
        score: [O, I] fp32, any strides (a transposed view is as fast).
        grad: [N, O], fp32, bf16 or fp16, unit last stride.
        x: [N, I], as ``grad``.
        starts: [B] int64, the first row of every sample; None: every row is a sample.
        ends: [B] int64, one past the last row of every sample. Rows of no sample are not read.
        power: 2 or 1.
    """
    if score.numel() == 0:
        return
    f = power_function(power)
    if starts is None or ends is None:
        for g, a in zip(grad.split(_ROWS), x.split(_ROWS), strict=True):
            score.addmm_(f(g.float()).T, f(a.float()))
        return
    samples = list(zip(starts.tolist(), ends.tolist(), strict=True))
    for first in _parts([start for start, end in samples if end == start + 1], _ROWS):
        g, a = _rows(grad, x, first, 1)
        score.addmm_(f(g).T, f(a))
    samples = [(start, end) for start, end in samples if end > start + 1]
    if score.numel() < SMALL_WEIGHT:
        _add_in_batches(score, grad, x, samples, power)
    else:
        _add_in_tiles(score, grad, x, samples, power)


def _add_in_tiles(
    score: Tensor, grad: Tensor, x: Tensor, samples: list[tuple[int, int]], power: int
) -> None:
    """Score a large weight tile by tile, sample after sample."""
    if score.stride(0) < score.stride(1):
        score, grad, x = score.T, x, grad
    height, width = (-(-size // -(-size // _TILE)) for size in score.shape)
    buffer = score.new_empty(height * width)
    for top in range(0, score.shape[0], height):
        for left in range(0, score.shape[1], width):
            tile = score[top : top + height, left : left + width]
            sample = buffer[: tile.numel()].view(tile.shape)
            g, a = grad[:, top : top + height], x[:, left : left + width]
            for start, end in samples:
                torch.mm(g[start:end].float().T, a[start:end].float(), out=sample)
                add_sample(tile, sample, power)


def _add_in_batches(
    score: Tensor, grad: Tensor, x: Tensor, samples: list[tuple[int, int]], power: int
) -> None:
    """Score a small weight, samples of one length in batches."""
    if score.shape[0] > score.shape[1]:  # products of a few long rows are the faster ones
        score, grad, x = score.T, x, grad
    by_length: dict[int, list[int]] = {}
    for start, end in samples:
        by_length.setdefault(end - start, []).append(start)
    for length, starts in by_length.items():
        for first in _parts(starts, max(1, _HELD // (score.numel() + length * sum(score.shape)))):
            g, a = (t.view(len(first), length, -1) for t in _rows(grad, x, first, length))
            add_samples(score, torch.bmm(g.transpose(1, 2), a), power)


def _parts(values: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _rows(grad: Tensor, x: Tensor, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Return the rows of samples of one length in fp32: views if they follow one another."""
    if all(second - first == length for first, second in pairwise(starts)):
        rows = slice(starts[0], starts[-1] + length)
        return grad[rows].float(), x[rows].float()
    first = torch.tensor(starts, device=grad.device).unsqueeze(1)
    index = (first + torch.arange(length, device=grad.device)).flatten()
    return grad.index_select(0, index).float(), x.index_select(0, index).float()
