"""Per-sample squared gradients of a convolution's weight, added to its scores: plain torch.

A sample's gradient is the product of the output's gradient and of the windows of the input, taken a
few output rows at a time, so that the windows stay in a CPU's caches. See accumulate.py for f.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fishfast.fisher.engine.accumulate_linear import SMALL_WEIGHT, add_linear
from fishfast.fisher.engine.power import add_sample, add_samples

__all__ = ["add_conv", "padded", "windows"]

# fp32 values (4 MB) of the windows, or of the samples' gradients, that are held at once.
_HELD = 2**20
# Output positions at least in one product: shorter ones cost more than windows that miss the cache.
_POSITIONS = 32
# Positions of one sum in a depthwise convolution, which adds one by one: longer sums are split in
# blocks, as they lose a digit more.
_BLOCK = 4096


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
    """Add ``sum_b f( gradient of sample b's conv2d weight )`` to ``score``.

    Args:
        score: [O, C / groups, kh, kw] fp32.
        grad: [B, O, H', W'], the gradient of the output; fp32, bf16 or fp16, any strides.
        x: [B, C, H, W], the input, as ``grad``.
        stride: of the convolution.
        padding: zeros on each side.
        dilation: of the convolution.
        groups: of the convolution.
        power: 2 or 1.
    """
    if grad.numel() == 0 or score.numel() == 0:
        return
    if grad.shape[2] == 1 and grad.shape[3] > 1:  # a conv1d: rows are what the loops split
        score, grad, x = (t.transpose(2, 3) for t in (score, grad, x))
        stride, padding, dilation = ((w, h) for h, w in (stride, padding, dilation))
    if tuple(score.shape[2:]) == (1, 1) and groups == 1 and not any(padding):
        _add_pointwise(score[:, :, 0, 0], grad, x[:, :, :: stride[0], :: stride[1]], power)
    elif groups == x.shape[1] > 1:
        _add_depthwise(score, grad, x, stride, padding, dilation, power)
    else:
        _add_windows(score, grad, x, stride, padding, dilation, groups, power)


def _add_pointwise(score: Tensor, grad: Tensor, x: Tensor, power: int) -> None:
    """Score a 1x1 convolution: a linear layer whose positions are the pixels, in any layout."""
    if grad.shape[2:].numel() == 1:
        add_linear(score, grad[:, :, 0, 0], x[:, :, 0, 0], None, None, power)
        return
    if score.numel() < SMALL_WEIGHT:
        step = max(1, _HELD // score.numel())
        for g, a in zip(grad.split(step), x.split(step), strict=True):
            left, right = g.flatten(2).float(), a.flatten(2).float().transpose(1, 2)
            add_samples(score, torch.bmm(left, right), power)
        return
    buffer = torch.empty(score.shape, device=score.device)
    for g, a in zip(grad, x, strict=True):
        torch.mm(g.flatten(1).float(), a.flatten(1).float().T, out=buffer)
        add_sample(score, buffer, power)


def _add_windows(
    score: Tensor,
    grad: Tensor,
    x: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    power: int,
) -> None:
    """Score any convolution by products with windows that are copied out of the input.

    Without groups the channels come last in the windows, which makes the copies' runs long.
    """
    num_out, channels, kh, kw = score.shape
    height, width = grad.shape[2:]
    window = channels * groups * kh * kw
    step = min(len(x), max(1, _HELD // max(score.numel(), window * height * width)))
    rows = height if step > 1 else max(-(-_POSITIONS // width), _HELD // (window * width))
    channels_last = groups == 1
    weight_shape = (num_out, kh, kw, channels) if channels_last else tuple(score.shape)
    total = torch.zeros(weight_shape, device=x.device)
    grads = torch.empty((step * groups, num_out // groups, window // groups), device=x.device)
    for g, a in zip(grad.split(step), x.split(step), strict=True):
        n = len(a)
        sums = grads[: n * groups]
        a = padded(a, padding, channels_last)
        for top in range(0, height, rows):
            block = g[:, :, top : top + rows].float()
            left = block.reshape(n * groups, num_out // groups, -1)
            seen = windows(a, score, block, stride, dilation, top, groups)
            if channels_last:
                right = seen.permute(0, 1, 5, 6, 3, 4, 2).reshape(n, left.shape[2], -1)
            else:
                right = seen.reshape(n * groups, -1, left.shape[2]).transpose(1, 2)
            beta = 1 if top else 0
            if len(sums) == 1:  # a batch of one is slower on several threads
                torch.addmm(sums[0], left[0], right[0], beta=beta, out=sums[0])
            else:
                torch.baddbmm(sums, left, right, beta=beta, out=sums)
        add_samples(total, sums.view(n, *weight_shape), power)
    score += total.permute(0, 3, 1, 2) if channels_last else total


def padded(x: Tensor, padding: tuple[int, int], channels_last: bool) -> Tensor:
    """Return the input in fp32 between its zeros; as the products read it, or channels last."""
    around = F.pad(x.float(), (padding[1], padding[1], padding[0], padding[0]))
    # Channels whose distance is a power of two share a few lines of the cache, hence in this order.
    return around.contiguous(memory_format=torch.channels_last) if channels_last else around


def windows(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    top: int,
    groups: int,
) -> Tensor:
    """Return the windows of some output rows, a view [n, groups, C / groups, kh, kw, rows, W']."""
    channels, kh, kw = weight.shape[1:]
    s = x.stride()
    return x.as_strided(
        (len(x), groups, channels, kh, kw, *grad.shape[2:]),
        (s[0], channels * s[1], s[1], dilation[0] * s[2], dilation[1] * s[3])
        + (stride[0] * s[2], stride[1] * s[3]),
        top * stride[0] * s[2],
    )


def _add_depthwise(
    score: Tensor,
    grad: Tensor,
    x: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    power: int,
) -> None:
    """Score a convolution of every channel alone.

    A sample's gradient is itself a depthwise convolution, of the input by the output's gradient:
    torch's forward is up to 20 times as fast as its weight gradient, and a batch is one call.
    """
    channels, (kh, kw) = x.shape[1], score.shape[2:]
    height, width = grad.shape[2:]
    rows = max(1, _BLOCK // width)
    step = max(1, _HELD // (x[0].numel() + grad[0].numel()))
    used = (width - 1) * stride[1] + (kw - 1) * dilation[1] + 1
    # [C, multiplier, kh, kw]: one convolution for each of the outputs that share an input.
    scores = score.unflatten(0, (channels, -1))[:, :, 0].unbind(1)
    for g, a in zip(grad.split(step), x.split(step), strict=True):
        n = len(a)
        a = padded(a, padding, channels_last=False).flatten(0, 1)[None, ..., :used]
        kernels = g.float().unflatten(1, (channels, -1)).unbind(2)
        for one, kernel in zip(scores, kernels, strict=True):
            kernel = kernel.reshape(n * channels, 1, height, width)
            sums = torch.zeros((1, n * channels, kh, kw), device=x.device)
            for top in range(0, height, rows):
                block = kernel[:, :, top : top + rows]
                span = (block.shape[2] - 1) * stride[0] + (kh - 1) * dilation[0] + 1
                part = a[:, :, top * stride[0] : top * stride[0] + span]
                sums += F.conv2d(part, block, None, dilation, 0, stride, n * channels)
            add_samples(one, sums.view(n, channels, kh, kw), power)
