"""Per-sample squared weight gradients of a 2-D convolution, without unfolding the input.

    score[o, c, r, s] += sum_b f( sum_p grad[b, o, p] x[b, g C' + c, h(p, r), w(p, s)] )
    h(p, r) = row(p) stride_h + r dilation_h - padding_h, likewise w(p, s)
    g is o's group, C' its number of input channels, f = square or abs

For each group it is a matrix product of [O', P] and [P, taps C'], whose second operand the kernel
reads in place: the position and the tap give the address, what lies in the padding is masked. A
program owns a tile of one group's weight and walks through the positions of all samples, or of a
group of samples; the positions of one sample are never divided, because f is not linear.
Deterministic: no atomics, a fixed order of sums.
"""

# mypy: disallow-untyped-defs=False
# The arguments of kernels get their types at the launch.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fisher_linear import add_linear
from .launch import MULTIPLE, divide_samples, fp32_precision

__all__ = ["CONFIGS", "Config", "add_conv", "conv_kernel"]


class Config(NamedTuple):
    """How the kernel is compiled: the tile of the weight, positions per step, and resources."""

    block_o: int
    block_i: int
    block_p: int
    num_warps: int
    num_stages: int
    tiles_per_sm: int


CONFIGS = {
    # bf16 and fp16, all sizes divisible by 16: loads are vectors, and enough of them under way.
    "channels_last": Config(128, 128, 32, 8, 3, 1),
    # Element by element: few registers, so that programs take turns while the others wait.
    "half": Config(64, 64, 32, 8, 3, 2),
    "single": Config(64, 32, 16, 4, 3, 4),
    # Up to 16 output channels in a group.
    "narrow": Config(16, 64, 32, 4, 3, 4),
}


@triton.jit(do_not_specialize=["num_samples", "samples_per_split", "power"])
def conv_kernel(
    out_ptr,  # [splits, num_groups, rows, columns] fp32: whole tiles, columns are (tap, channel)
    grad_ptr,
    x_ptr,
    grad_strides,  # b, o, p
    x_strides,  # b, c, h, w
    num_samples,
    samples_per_split,
    num_groups,
    group_out,  # output channels of a group
    group_in,  # input channels of a group
    num_positions,
    out_width,
    height,
    width,
    kernel_w,
    num_taps,
    stride,  # h, w
    padding,  # h, w
    dilation,  # h, w
    power,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sum f of each sample's product over the samples of this split."""
    rows = tl.cdiv(group_out, BLOCK_O).to(tl.int64) * BLOCK_O
    columns = tl.cdiv(num_taps * group_in, BLOCK_I).to(tl.int64) * BLOCK_I
    tile = tl.program_id(0) // num_groups
    group = tl.program_id(0) % num_groups
    split = tl.program_id(1).to(tl.int64)
    o = tile // (columns // BLOCK_I) * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    i = tile % (columns // BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    out_ptr += ((split * num_groups + group) * rows + o) * columns + i
    # Channels are the fast index: where they are contiguous, x is loaded in vectors.
    mask_o = o < group_out
    mask_i = i < num_taps * group_in
    c = i % group_in
    h_tap = (i // group_in // kernel_w * dilation[0] - padding[0]).to(tl.int32)
    w_tap = (i // group_in % kernel_w * dilation[1] - padding[1]).to(tl.int32)
    grad_ptr += (group * group_out + o) * grad_strides[1]
    x_ptr += (group * group_in + c) * x_strides[1]
    x_ptr += h_tap.to(tl.int64) * x_strides[2] + w_tap.to(tl.int64) * x_strides[3]

    b = split * samples_per_split
    last = tl.minimum(b + samples_per_split, num_samples)
    steps = (last - b) * tl.cdiv(num_positions, BLOCK_P)
    start = 0
    product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    # One loop over the steps of all samples: its pipeline of loads does not drain between samples.
    for _ in range(steps.to(tl.int32)):
        p = start + tl.arange(0, BLOCK_P)
        g = tl.load(
            grad_ptr + b * grad_strides[0] + p.to(tl.int64)[None, :] * grad_strides[2],
            mask=mask_o & (p < num_positions)[None, :],
            other=0.0,
        )
        h = (p // out_width * stride[0])[:, None]
        w = (p % out_width * stride[1])[:, None]
        inside = (h + h_tap >= 0) & (h + h_tap < height) & (w + w_tap >= 0) & (w + w_tap < width)
        offset = h.to(tl.int64) * x_strides[2] + w.to(tl.int64) * x_strides[3]
        a = tl.load(
            x_ptr + (b * x_strides[0] + offset),
            mask=inside & (p < num_positions)[:, None] & mask_i,
            other=0.0,
        )
        product = tl.dot(g, a, product, input_precision=PRECISION)
        start += BLOCK_P
        done = start >= num_positions
        b += done.to(tl.int64)
        start = tl.where(done, 0, start)
        if done:
            total += product * product if power == 2 else tl.abs(product)
            product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    tl.store(out_ptr, total)


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
    """Add ``sum_b f(gradient of sample b)`` of a convolution's weight to ``score``, in place.

    Args:
        score: [O, C / groups, kh, kw] fp32, any strides.
        grad: [B, O, H', W'] fp32, bf16 or fp16, gradient of the output.
        x: [B, C, H, W], the input, of the same dtype. Channels last is the faster layout.
        stride: of height and width, as are the next two.
        padding: zeros on each side.
        dilation: distance between taps.
        groups: each sees C / groups input channels. A depthwise convolution runs through the same
            kernel: its cost is that x is read once per tap, the product costs nothing beside it.
        power: 2 (f squares) or 1 (f takes the absolute value).
    """
    if score.numel() == 0 or grad.numel() == 0:
        return
    num_samples, _, out_height, out_width = grad.shape
    _, group_in, kernel_h, kernel_w = score.shape
    group_out, num_taps = len(score) // groups, kernel_h * kernel_w
    channels_last = not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)

    pointwise = (kernel_h, kernel_w, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1)
    if pointwise and (channels_last or out_height * out_width == 1):
        grad, x = (tensor.permute(0, 2, 3, 1).flatten(0, 2) for tensor in (grad, x))
        starts = torch.arange(num_samples, device=x.device) * (out_height * out_width)
        ends = starts + out_height * out_width
        add_linear(score[:, :, 0, 0], grad, x, starts, ends, power)
        return

    single = grad.dtype == torch.float32
    if group_out <= 16:
        config = CONFIGS["narrow"]
    elif single:
        config = CONFIGS["single"]
    else:
        vectors = channels_last and group_out % MULTIPLE == 0 and group_in % MULTIPLE == 0
        config = CONFIGS["channels_last" if vectors and group_out > 64 else "half"]
    tiles_o = triton.cdiv(group_out, config.block_o)
    tiles_i = triton.cdiv(num_taps * group_in, config.block_i)
    tiles = groups * tiles_o * tiles_i
    splits, units = divide_samples(score.device, num_samples, tiles, config.tiles_per_sm)
    out = score.new_empty(splits, groups, tiles_o * config.block_o, tiles_i * config.block_i)
    grad = grad.flatten(2)
    with torch.cuda.device_of(score):
        conv_kernel[tiles, splits](
            out_ptr=out,
            grad_ptr=grad,
            x_ptr=x,
            grad_strides=grad.stride(),
            x_strides=x.stride(),
            num_samples=num_samples,
            samples_per_split=units,
            num_groups=groups,
            group_out=group_out,
            group_in=group_in,
            num_positions=out_height * out_width,
            out_width=out_width,
            height=x.shape[2],
            width=x.shape[3],
            kernel_w=kernel_w,
            num_taps=num_taps,
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
            power=power,
            PRECISION=fp32_precision() if single else "tf32",
            BLOCK_O=config.block_o,
            BLOCK_I=config.block_i,
            BLOCK_P=config.block_p,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    total = out.sum(0)[:, :group_out, : num_taps * group_in]
    by_tap = total.reshape(len(score), kernel_h, kernel_w, group_in)
    score += by_tap.permute(0, 3, 1, 2)
