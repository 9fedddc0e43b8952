"""What the primitives compute, in float64 and plain loops over samples and positions."""

from __future__ import annotations

import itertools

import numpy as np


def f(values, power):
    return values * values if power == 2 else np.abs(values)


def linear(grad, x, starts, ends, power):
    """score[o, i] = sum_b f(sum_r grad[r, o] x[r, i])."""
    grad, x = grad.double().numpy(), x.double().numpy()
    if starts is None:
        starts, ends = range(len(grad)), range(1, len(grad) + 1)
    score = np.zeros((grad.shape[1], x.shape[1]))
    for start, end in zip(starts, ends, strict=True):
        product = np.zeros_like(score)
        for row in range(int(start), int(end)):
            product += np.outer(grad[row], x[row])
        score += f(product, power)
    return score


def sums(grad, x, mean, rstd, power):
    """score[d] = sum_b f(sum_t grad[b, t, d] xhat[b, t, d])."""
    values = grad.double().numpy()
    if x is not None:
        normalized = x.double().numpy()
        normalized = normalized - (0.0 if mean is None else mean.double().numpy())
        values = values * normalized * (1.0 if rstd is None else rstd.double().numpy())
    score = np.zeros(grad.shape[2])
    for sample in values:
        total = np.zeros_like(score)
        for position in sample:
            total += position
        score += f(total, power)
    return score


def embedding(num_tokens, tokens, samples, grad, power):
    """score[v] = sum_b f(sum of the rows of sample b with token v)."""
    per_sample: dict[tuple[int, int], np.ndarray] = {}
    for token, sample, row in zip(
        tokens.tolist(), samples.tolist(), grad.double().numpy(), strict=True
    ):
        per_sample[token, sample] = per_sample.get((token, sample), 0.0) + row
    score = np.zeros((num_tokens, grad.shape[1]))
    for (token, _), total in per_sample.items():
        score[token] += f(total, power)
    return score


def conv(shape, grad, x, stride, padding, dilation, groups, power):
    """One tap at a time, one position at a time, on an input that is padded for real."""
    grad, x = grad.double().numpy(), x.double().numpy()
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    num_out, group_in, kernel_h, kernel_w = shape
    group_out = num_out // groups
    score = np.zeros(shape)
    for sample in range(len(grad)):
        weight = np.zeros(shape)
        for group, r, s in itertools.product(range(groups), range(kernel_h), range(kernel_w)):
            out = slice(group * group_out, (group + 1) * group_out)
            channels = slice(group * group_in, (group + 1) * group_in)
            for h, w in np.ndindex(*grad.shape[2:]):
                seen = x[
                    sample,
                    channels,
                    h * stride[0] + r * dilation[0],
                    w * stride[1] + s * dilation[1],
                ]
                weight[out, :, r, s] += np.outer(grad[sample, out, h, w], seen)
        score += f(weight, power)
    return score
