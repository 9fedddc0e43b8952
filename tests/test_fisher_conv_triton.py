"""fishfast.kernels.fisher_conv against float64 loops: in the interpreter, and on a card."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES
from triton_cpu import oracle, plain
from triton_cpu.comparing import assert_close, random
from triton_cpu.running import WHERE, run


class Conv(NamedTuple):
    """Sizes of a convolution and its batch."""

    batch: int
    channels: int
    size: tuple[int, int]
    num_out: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


CONVS = {
    "plain": Conv(3, 4, (7, 6), 5, (3, 3)),
    "one-sample": Conv(1, 3, (5, 5), 17, (2, 2)),
    "padding": Conv(2, 5, (5, 4), 6, (3, 3), padding=(1, 2)),
    "stride": Conv(2, 3, (9, 8), 4, (3, 2), stride=(2, 3), padding=(1, 0)),
    "border-that-no-output-sees": Conv(2, 3, (10, 10), 4, (2, 2), stride=(3, 3)),
    "dilation": Conv(2, 3, (9, 11), 4, (3, 3), dilation=(2, 3), padding=(2, 1)),
    "stride-padding-dilation": Conv(2, 2, (11, 9), 3, (3, 2), (2, 1), (3, 2), (2, 3)),
    "even-kernel": Conv(2, 3, (6, 6), 4, (4, 4), padding=(3, 3)),
    "patches": Conv(2, 3, (8, 8), 20, (4, 4), stride=(4, 4)),
    "one-dim": Conv(3, 6, (1, 30), 4, (1, 5), stride=(1, 2), padding=(0, 2)),
    "groups": Conv(2, 12, (6, 5), 6, (3, 3), padding=(1, 1), groups=3),
    "groups-of-many": Conv(2, 8, (5, 5), 40, (3, 3), groups=2),
    "depthwise": Conv(2, 7, (6, 6), 7, (3, 3), padding=(1, 1), groups=7),
    "depthwise-multiplier": Conv(2, 5, (5, 5), 10, (3, 3), stride=(2, 2), groups=5),
    "pointwise": Conv(3, 9, (5, 4), 8, (1, 1)),
    "pointwise-stride": Conv(2, 9, (6, 4), 8, (1, 1), stride=(2, 2)),
    "pointwise-of-pooled": Conv(4, 9, (1, 1), 8, (1, 1)),
    "several-tiles": Conv(2, 24, (5, 5), 70, (3, 3), padding=(1, 1)),
    "whole-input": Conv(3, 2, (4, 4), 3, (4, 4)),
}


def operands(conv, dtype, layout=torch.contiguous_format):
    """What no output sees of the input is NaN: it must not reach a result."""
    shape = (conv.num_out, conv.channels // conv.groups, *conv.kernel)
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    x = torch.zeros(conv.batch, conv.channels, *conv.size, requires_grad=True)
    out = torch.nn.functional.conv2d(x, torch.ones(shape), None, *options)
    out.sum().backward()
    x = random(*x.shape, dtype=dtype).masked_fill(x.grad == 0, torch.nan)
    grad = random(*out.shape, dtype=dtype, seed=1)
    return shape, grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout)


def check(where, score, conv, grad, x, power, num_sms=8):
    before = score.clone()
    options = (conv.stride, conv.padding, conv.dilation, conv.groups, power)
    run(where, "add_conv", score, grad, x, *options, num_sms=num_sms)
    names = ("stride", "padding", "dilation", "groups", "power")
    assert_close(
        score,
        before,
        functools.partial(plain.conv, grad=grad, x=x, **dict(zip(names, options, strict=True))),
        oracle.conv(score.shape, grad, x, *options),
    )


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(where, name, layout, dtype) -> None:
    shape, grad, x = operands(CONVS[name], dtype, getattr(torch, layout))
    check(where, torch.rand(shape), CONVS[name], grad, x, 2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["padding", "groups", "depthwise", "pointwise"])
def test_absolute_values(where, name, dtype) -> None:
    shape, grad, x = operands(CONVS[name], dtype)
    check(where, torch.rand(shape), CONVS[name], grad, x, 1)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("power", [1, 2])
def test_every_sample_begins_its_sum_anew(where, power) -> None:
    """Whatever f is: several samples in each program."""
    conv = CONVS["padding"]._replace(batch=13)
    shape, grad, x = operands(conv, torch.float32)
    check(where, torch.rand(shape), conv, grad, x, power, num_sms=1)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_large_tiles(where, groups, dtype) -> None:
    """Channels last and all sizes multiples of 16; the tile is wider than a tap's channels."""
    conv = Conv(2, 16 * groups, (5, 7), 80 * groups, (3, 3), padding=(1, 1), groups=groups)
    shape, grad, x = operands(conv, dtype, torch.channels_last)
    check(where, torch.rand(shape), conv, grad, x, 2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("num_sms", [1, 2, 100])
@pytest.mark.parametrize("name", ["several-tiles", "groups"])
def test_samples_divided_among_programs(where, name, num_sms) -> None:
    conv = CONVS[name]._replace(batch=5)
    shape, grad, x = operands(conv, torch.float32)
    check(where, torch.rand(shape), conv, grad, x, 2, num_sms)


@pytest.mark.parametrize("where", WHERE)
def test_strides(where) -> None:
    """A score in channels last, a gradient that was expanded, an input sliced out of NaN."""
    conv = CONVS["padding"]
    shape, grad, x = operands(conv, torch.float32)
    whole = torch.full((2, 9, 8, 6), torch.nan)
    inner = whole[:, 2:7, 1:6, ::2][:, :, :, :3]
    inner = whole[:, 2:7, 1:6, 1:5].copy_(x)
    expanded = grad[:, :, :1, :1].expand_as(grad)
    score = torch.rand(shape).contiguous(memory_format=torch.channels_last)
    check(where, score, conv, expanded, inner, 2)
    check(where, torch.rand(shape), conv, grad, inner, 2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["several-tiles", "depthwise"])
def test_same_bits_every_time(where, name) -> None:
    conv = CONVS[name]._replace(batch=4)
    shape, grad, x = operands(conv, torch.bfloat16)
    scores = [torch.zeros(shape) for _ in range(2)]
    for score in scores:
        run(
            where, "add_conv", score, grad, x, conv.stride, conv.padding, conv.dilation,
            conv.groups, 2,
        )  # fmt: skip
    assert torch.equal(*scores)


@pytest.mark.parametrize("where", WHERE)
def test_empty(where) -> None:
    score = torch.rand(4, 3, 2, 2)
    before = score.clone()
    grad, x = torch.zeros(0, 4, 5, 5), torch.zeros(0, 3, 6, 6)
    assert run(where, "add_conv", score, grad, x, (1, 1), (0, 0), (1, 1), 1, 2) <= 0
    assert torch.equal(score, before)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
def test_past_two_billion_elements(layout) -> None:
    from fishfast.kernels.fisher_conv import add_conv

    layout = getattr(torch, layout)
    x = torch.zeros(9, 16, 4096, 4096, dtype=torch.bfloat16, device="cuda")
    x = x.contiguous(memory_format=layout)
    x[-1, :, -8:, -8:] = 1.0
    grad = torch.zeros(9, 16, 512, 512, dtype=torch.bfloat16, device="cuda")
    grad[-1, :, -1, -1] = 1.0
    score = torch.zeros(16, 16, 8, 8, device="cuda")
    add_conv(score, grad.contiguous(memory_format=layout), x, (8, 8), (0, 0), (1, 1), 1, 2)
    assert (score == 1.0).all()
