"""The same in plain torch: every sample's gradient in the operands' dtype, then f, summed in fp32.

What a user without the kernels would write; its error is the measure of theirs.
"""

from __future__ import annotations

import torch
from torch.nn.grad import conv2d_weight


def f(values, power):
    return values.float().square() if power == 2 else values.float().abs()


def linear(score, grad, x, starts, ends, power):
    if starts is None:
        starts = torch.arange(len(grad))
        ends = starts + 1
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        score += f(grad[start:end].T @ x[start:end], power)


def sums(score, grad, x, mean, rstd, power):
    values = grad
    if x is not None:
        x = x if mean is None else x - mean.to(x.dtype)
        x = x if rstd is None else x * rstd.to(x.dtype)
        values = grad * x
    for sample in values:
        score += f(sample.sum(0), power)


def embedding(score, tokens, samples, grad, power):
    for sample in samples.unique():
        rows = samples == sample
        table = torch.zeros(score.shape, dtype=grad.dtype)
        score += f(table.index_add_(0, tokens[rows], grad[rows]), power)


def conv(score, grad, x, stride, padding, dilation, groups, power):
    for one_x, one_grad in zip(x, grad, strict=True):
        weight = conv2d_weight(
            one_x[None], score.shape, one_grad[None], stride, padding, dilation, groups
        )
        score += f(weight, power)
