"""The sums of accumulate.py on the CPU, with csrc/fisher_linear_cpu.cpp where samples are short.

A product per sample costs a pass over the weight, which a sample of few rows does not pay for: at
16 rows torch's products take twice the time of the weight's ordinary gradient, at 4 rows six to
nine times. Samples of many rows are torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishfast import _backend
from fishfast.fisher.engine import accumulate
from fishfast.fisher.engine.accumulate import add_embedding, add_sum
from fishfast.fisher.engine.accumulate_conv import interior, padded_zeros, windows

__all__ = ["add_conv", "add_embedding", "add_linear", "add_sum"]

# Mean rows of a sample up to which the compiled kernel runs. It has 0.85 to 0.9 of MKL's rate with
# AVX2 and catches up at 128 rows; a machine with wider vectors would do so earlier.
_SHORT = 64
# fp32 values (4 MB) of a convolution's windows that are held at once.
_HELD = 2**20
# Multiplications that keep a thread busy for longer than its start takes.
_PER_THREAD = 2**22


def add_linear(
    score: Tensor,
    grad: Tensor,
    x: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    power: int,
) -> None:
    """Add ``sum_b f( sum_{r in b} grad[r, o] x[r, i] )`` to ``score[o, i]``; see accumulate.py."""
    if starts is None or ends is None or len(grad) > _SHORT * len(starts):
        accumulate.add_linear(score, grad, x, starts, ends, power)
        return
    if score.stride(1) != 1 and score.stride(0) == 1:
        score, grad, x = score.T, x, grad
    if score.stride(1) != 1 or not all(t.numel() for t in (score, grad, x, starts)):
        accumulate.add_linear(score, grad, x, starts, ends, power)
        return
    grad, x = (t.float() if t.stride(-1) == 1 else t.float().contiguous() for t in (grad, x))
    starts, ends = starts.contiguous(), ends.contiguous()
    useful_threads = 1 + score.numel() * len(grad) // _PER_THREAD
    _backend.compiled().fisher_linear_cpu(
        *(t.data_ptr() for t in (score, grad, x, starts, ends)),
        sizes=(*score.shape, len(grad), len(starts)),
        strides=[t.stride(0) for t in (score, grad, x)],
        power=power,
        num_threads=min(_backend.num_threads(), useful_threads),
    )


def add_conv(
    score: Tensor,
    grad: Tensor,
    x: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    power: int,
) -> None:
    """Add ``sum_b f( gradient of sample b's conv2d weight )`` to ``score``; see accumulate.py.

    One with few output positions is a linear layer over its windows, copied.
    """
    num_out, channels, kh, kw = score.shape
    positions = grad.shape[2:].numel()
    # A 1x1 convolution's products need no copies, which pay for themselves later.
    few = _SHORT // 4 if kh * kw == 1 else _SHORT
    too_many = positions > few or channels * kh * kw * positions > _HELD
    if groups > 1 or too_many or grad.numel() == 0:
        accumulate.add_conv(score, grad, x, stride, padding, dilation, groups, power)
        return
    step = min(len(x), _HELD // max(1, channels * kh * kw * positions))
    padded = padded_zeros(x[:step], padding, channels_last=True)
    total = torch.zeros((num_out, kh * kw * channels))  # channels last: longer runs to copy
    ends = torch.arange(1, step + 1) * positions
    for g, a in zip(grad.split(step), x.split(step), strict=True):
        n = len(a)
        interior(padded[:n], padding).copy_(a)
        seen = windows(padded[:n], score, g, stride, dilation, 0, 1)
        rows = seen.permute(0, 1, 5, 6, 3, 4, 2).reshape(n * positions, -1)
        grads = g.flatten(2).transpose(1, 2).reshape(n * positions, -1).float()
        if positions == 1:
            accumulate.add_linear(total, grads, rows, None, None, power)
        else:
            add_linear(total, grads, rows, ends[:n] - positions, ends[:n], power)
    score += total.view(num_out, kh, kw, channels).permute(0, 3, 1, 2)
