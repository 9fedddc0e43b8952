"""fishfast.fisher.engine.accumulate and accumulate_cpu: against float64 loops, in little room.

Plain torch is one fp32 product per sample here whatever the operands' dtype, so that operands of 16
bits have to be as exact as their values in fp32.
"""

from __future__ import annotations

import itertools
import sys
import weakref

import pytest
import torch
from cases import DTYPES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_cpu import oracle, plain
from triton_cpu.comparing import assert_close, random

from fishfast import _backend
from fishfast.fisher.engine import (
    accumulate,
    accumulate_conv,
    accumulate_cpu,
    accumulate_linear,
)

POWERS = [pytest.param(1, id="abs"), pytest.param(2, id="square")]
NAN = float("nan")
IN_TORCH = accumulate  # `backend` changes what the name stands for


@pytest.fixture(params=[accumulate, accumulate_cpu], ids=["torch", "compiled"])
def backend(request, monkeypatch):
    """Both modules under the name of the one, and every thread of the compiled one busy."""
    monkeypatch.setattr(sys.modules[__name__], "accumulate", request.param)
    monkeypatch.setattr(_backend, "_START_OF_THREADS", 0)


@pytest.fixture(params=["all-at-once", "a-few-at-a-time"])
def chunks(request, monkeypatch):
    """The sizes that are split, and the sizes of the parts, as they are and tiny."""
    if request.param == "a-few-at-a-time":
        for name, size in {"_TILE": 5, "_HELD": 60, "_ROWS": 3}.items():
            monkeypatch.setattr(accumulate_linear, name, size)
        for name, size in {"_HELD": 200, "_POSITIONS": 1, "_BLOCK": 10}.items():
            monkeypatch.setattr(accumulate_conv, name, size)
        for name, size in {"_HELD": 30, "_EMBEDDED": 20, "_COLUMNS": 2}.items():
            monkeypatch.setattr(IN_TORCH, name, size)


@pytest.fixture(params=["batches", "tiles"])
def road(request, monkeypatch):
    """Small weights go the one way, large weights the other."""
    for module in (accumulate_linear, accumulate_conv):
        monkeypatch.setattr(module, "SMALL_WEIGHT", {"batches": 2**40, "tiles": 0}[request.param])


def check(add, by_torch, truth, score, *tensors):
    """Compare with float64 and with plain torch; same bits again, operands left alone."""
    before, copies = score.clone(), [None if t is None else t.clone() for t in tensors]
    add(score, *tensors)
    first = score.clone()
    add(score.copy_(before), *tensors)
    assert torch.equal(score, first)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert tensor is None or torch.equal(tensor.nan_to_num(), copy.nan_to_num())
    in_fp32 = (t.float() if t is not None and t.is_floating_point() else t for t in tensors)
    assert_close(score, before, lambda total: by_torch(total, *in_fp32), truth)


# ---- add_linear --------------------------------------------------------------------------------


def packed(lengths, num_out, num_in, dtype, gap=0):
    """Rows of samples, with NaN in the rows between them."""
    starts, row = [], gap
    for length in lengths:
        starts.append(row)
        row += length + gap
    grad, x = torch.full((row, num_out), NAN), torch.full((row, num_in), NAN)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        grad[start : start + length] = random(length, num_out, dtype=dtype, seed=b)
        x[start : start + length] = random(length, num_in, dtype=dtype, seed=100 + b)
    starts = torch.tensor(starts, dtype=torch.int64)
    ends = starts + torch.tensor(lengths, dtype=torch.int64)
    return grad.to(dtype), x.to(dtype), starts, ends


def check_linear(score, grad, x, starts, ends, power):
    check(
        lambda total, g, a: accumulate.add_linear(total, g, a, starts, ends, power),
        lambda total, g, a: plain.linear(total, g, a, starts, ends, power),
        oracle.linear(grad, x, starts, ends, power),
        score,
        grad,
        x,
    )


@pytest.mark.usefixtures("backend", "chunks", "road")
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "gap"),
    [
        pytest.param([13], 0, id="one sample"),
        pytest.param([4, 4, 4, 4], 0, id="one length"),
        pytest.param([4, 4, 4, 4], 3, id="one length, padded"),
        pytest.param([5, 1, 0, 7, 1, 2, 2], 0, id="packed"),
        pytest.param([5, 1, 0, 7, 1, 2, 2], 2, id="padded"),
        pytest.param([1, 1, 1, 1, 1], 0, id="one row each"),
        pytest.param([1, 1, 1, 1, 1], 1, id="one row each, padded"),
    ],
)
def test_linear(lengths, gap, dtype, power):
    check_linear(torch.rand(7, 11), *packed(lengths, 7, 11, dtype, gap), power)


@pytest.mark.usefixtures("backend", "chunks")
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_single_rows(dtype, power):
    grad, x = random(7, 5, dtype=dtype), random(7, 9, dtype=dtype, seed=1)
    check_linear(torch.rand(5, 9), grad, x, None, None, power)


@pytest.mark.usefixtures("backend", "road")
@pytest.mark.parametrize("bounds", ["samples", "rows"])
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (1, 31), (33, 2), (31, 1), (17, 64)])
def test_linear_sizes(num_out, num_in, bounds):
    grad, x, *ends = packed([3, 8, 1], num_out, num_in, torch.float32)
    ends = ends if bounds == "samples" else (None, None)
    check_linear(torch.zeros(num_out, num_in), grad, x, *ends, 2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("num_out", "num_in"), [(1025, 70), (70, 1025), (1030, 1031)])
def test_linear_larger_than_a_tile(num_out, num_in):
    check_linear(torch.zeros(num_out, num_in), *packed([9, 2], num_out, num_in, torch.float32), 2)


@pytest.mark.usefixtures("backend", "chunks", "road")
@pytest.mark.parametrize("lengths", [[6, 3, 1], [1, 1, 1]])
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_linear_into_a_view_of_a_score(layout, lengths):
    """GPT-2 keeps its weights transposed; what lies beside a view is left alone."""
    whole = torch.rand(26, 34)
    rest = whole.clone()
    view = {"transposed": lambda t: t[:12, 1:9].T, "strided": lambda t: t[2:18:2, 3:27:2]}[layout]
    check_linear(view(whole), *packed(lengths, 8, 12, torch.float32), 2)
    view(rest).copy_(view(whole))
    assert torch.equal(whole, rest)


@pytest.mark.usefixtures("backend", "chunks", "road")
def test_linear_of_columns_of_wider_rows():
    grad, x, starts, ends = packed([6, 1, 6, 4], 20, 30, torch.bfloat16)
    check_linear(torch.rand(8, 12), grad[:, 5:13], x[:, 1:13], starts, ends, 2)


@pytest.mark.usefixtures("backend", "road")
@pytest.mark.parametrize(("num_rows", "num_samples"), [(0, 0), (0, 2), (5, 0), (5, 3)])
def test_linear_of_nothing(num_rows, num_samples):
    score = torch.rand(3, 4)
    before = score.clone()
    bounds = torch.zeros(num_samples, dtype=torch.int64)
    operands = torch.full((num_rows, 3), NAN), torch.full((num_rows, 4), NAN)
    accumulate.add_linear(score, *operands, bounds, bounds, 2)
    accumulate.add_linear(score, *(t[:0] for t in operands), None, None, 2)
    assert torch.equal(score, before)
    accumulate.add_linear(score[:, :0], operands[0], operands[1][:, :0], bounds, bounds, 2)


# ---- add_sum -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels last", "channels first"])
@pytest.mark.parametrize("factors", ["none", "x", "x, rstd", "x, mean, rstd", "per channel"])
def test_sum(factors, layout, dtype, power):
    shape = (5, 7, 9) if layout == "channels last" else (5, 9, 7)
    grad, x = (random(*shape, dtype=dtype, seed=seed) for seed in range(2))
    if layout == "channels first":
        grad, x = grad.transpose(1, 2), x.transpose(1, 2)
    statistics = (9,) if factors == "per channel" else (5, 7, 1)
    mean, rstd = (random(*statistics, dtype=torch.float32, seed=seed) for seed in range(2, 4))
    x = None if factors == "none" else x
    mean = mean if factors in {"x, mean, rstd", "per channel"} else None
    rstd = rstd if "rstd" in factors or factors == "per channel" else None
    check(
        lambda score, *operands: accumulate.add_sum(score, *operands, power),
        lambda score, *operands: plain.sums(score, *operands, power),
        oracle.sums(grad, x, mean, rstd, power),
        torch.rand(9),
        grad,
        x,
        mean,
        rstd,
    )


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_sum_of_nothing(shape):
    score = torch.rand(shape[2])
    before = score.clone()
    accumulate.add_sum(score, torch.rand(shape), torch.rand(shape), None, torch.rand(shape), 2)
    assert torch.equal(score, before)


def test_sum_of_an_expanded_gradient_into_a_view():
    """A loss that sums its output gives a gradient whose strides are all 0."""
    grad, whole = torch.full((1, 1, 1), 0.5).expand(3, 4, 6), torch.rand(2, 6)
    rest = whole.clone()
    accumulate.add_sum(whole[:, ::2][1], grad[..., ::2], None, None, None, 2)
    rest[1, ::2] += 3 * (4 * 0.5) ** 2
    assert torch.equal(whole, rest)


# ---- add_embedding -----------------------------------------------------------------------------


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "num_samples"),
    [(1, 9, 1), (1, 9, 4), (5, 33, 3), (50, 33, 3), (4, 1, 2)],
)
def test_embedding(num_tokens, num_rows, num_samples, dtype, power):
    generator = torch.Generator().manual_seed(num_rows)
    tokens = torch.randint(num_tokens, (num_rows,), generator=generator)
    samples = torch.randint(num_samples, (num_rows,), generator=generator)
    grad = random(num_rows, 7, dtype=dtype)
    check(
        lambda score, t, s, g: accumulate.add_embedding(score, t, s, g, power),
        lambda score, t, s, g: plain.embedding(score, t, s, g, power),
        oracle.embedding(num_tokens, tokens, samples, grad, power),
        torch.rand(num_tokens, 7),
        tokens,
        samples,
        grad,
    )


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("layout", ["transposed", "columns"])
def test_embedding_into_a_view_of_a_score(layout):
    view = {"transposed": lambda t: t.T, "columns": lambda t: t[:, 1:8]}[layout]
    score = torch.rand(view(torch.empty(9, 9)).shape[::-1] if layout == "transposed" else (9, 9))
    grad = view(torch.rand(9, 9))
    tokens, samples = torch.tensor([3, 3, 0, 8, 3, 0, 3, 3, 8]), torch.arange(9) % 4
    check(
        lambda total, t, s, g: accumulate.add_embedding(view(total), t, s, g, 2),
        lambda total, t, s, g: plain.embedding(view(total), t, s, g, 2),
        _inside(score, view, oracle.embedding(9, tokens, samples, grad, 2)),
        score,
        tokens,
        samples,
        grad,
    )


def _inside(score, view, values):
    """Return zeros of the score's shape with the values at the view."""
    whole = torch.zeros(score.shape, dtype=torch.float64)
    view(whole).copy_(torch.from_numpy(values))
    return whole.numpy()


def test_embedding_of_no_rows():
    score = torch.rand(3, 4)
    before = score.clone()
    none = torch.zeros(0, dtype=torch.int64)
    accumulate.add_embedding(score, none, none, torch.zeros(0, 4), 2)
    assert torch.equal(score, before)


# ---- add_conv ----------------------------------------------------------------------------------

# Batch, C, (H, W), O, kernel, and what is not 1, 0, 1, 1.
CONVS = {
    "plain": (3, 4, (7, 6), 5, (3, 3), {}),
    "one sample": (1, 3, (5, 5), 17, (2, 2), {}),
    "padding": (2, 5, (5, 4), 6, (3, 3), {"padding": (1, 2)}),
    "stride": (2, 3, (9, 8), 4, (3, 2), {"stride": (2, 3), "padding": (1, 0)}),
    "dilation": (2, 3, (9, 11), 4, (3, 3), {"dilation": (2, 3), "padding": (2, 1)}),
    "all": (2, 2, (11, 9), 3, (3, 2), {"stride": (2, 1), "padding": (3, 2), "dilation": (2, 3)}),
    "patches": (2, 3, (9, 9), 20, (4, 4), {"stride": (4, 4)}),
    "one channel": (3, 1, (6, 6), 4, (3, 3), {"padding": (1, 1)}),
    "conv1d": (3, 6, (1, 30), 4, (1, 5), {"stride": (1, 2), "padding": (0, 2)}),
    "conv1d of one position": (3, 6, (1, 5), 4, (1, 5), {}),
    "groups": (2, 12, (6, 5), 6, (3, 3), {"padding": (1, 1), "groups": 3}),
    "groups, all": (
        2, 8, (9, 8), 4, (2, 3),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
    ),
    "depthwise": (3, 7, (6, 6), 7, (3, 3), {"padding": (1, 1), "groups": 7}),
    "depthwise, all": (
        2, 5, (9, 8), 5, (3, 2),
        {"stride": (2, 3), "padding": (2, 1), "dilation": (2, 2), "groups": 5},
    ),
    "depthwise, unused border": (2, 3, (8, 8), 3, (3, 3), {"stride": (3, 3), "groups": 3}),
    "depthwise, several each": (2, 5, (5, 6), 15, (3, 3), {"stride": (2, 1), "groups": 5}),
    "depthwise conv1d": (2, 6, (1, 20), 6, (1, 4), {"padding": (0, 3), "groups": 6}),
    "1x1": (3, 9, (5, 4), 8, (1, 1), {}),
    "1x1, stride": (3, 9, (6, 5), 8, (1, 1), {"stride": (2, 3)}),
    "1x1, padding": (2, 9, (3, 2), 8, (1, 1), {"padding": (1, 0)}),
    "1x1, groups": (2, 8, (3, 2), 6, (1, 1), {"groups": 2}),
    "1x1 of one pixel": (4, 9, (1, 1), 8, (1, 1), {}),
    "whole input": (3, 2, (4, 4), 3, (4, 4), {}),
    "unused border": (2, 3, (8, 8), 4, (3, 3), {"stride": (3, 3)}),
}  # fmt: skip
PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def convolution(name, dtype, layout="contiguous_format"):
    """Return the score's shape, both operands and the options."""
    batch, channels, size, num_out, kernel, options = CONVS[name]
    options = {**PLAIN, **options}
    x = random(batch, channels, *size, dtype=dtype)
    shape = (num_out, channels // options["groups"], *kernel)
    out = torch.nn.functional.conv2d(x.float(), torch.zeros(shape), **options)
    grad = random(*out.shape, dtype=dtype, seed=1)
    layout = getattr(torch, layout)
    return shape, grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout), options


def check_conv(score, grad, x, options, power):
    check(
        lambda total, g, a: accumulate.add_conv(total, g, a, **options, power=power),
        lambda total, g, a: plain.conv(total, g, a, **options, power=power),
        oracle.conv(score.shape, grad, x, **options, power=power),
        score,
        grad,
        x,
    )


@pytest.mark.usefixtures("backend", "chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, layout, dtype):
    shape, grad, x, options = convolution(name, dtype, layout)
    check_conv(torch.rand(shape), grad, x, options, 2)


@pytest.mark.usefixtures("backend", "chunks", "road")
@pytest.mark.parametrize(
    "name", ["all", "depthwise, all", "groups, all", "1x1", "1x1 of one pixel"]
)
def test_conv_of_absolute_values(name):
    shape, grad, x, options = convolution(name, torch.float32)
    check_conv(torch.rand(shape), grad, x, options, 1)


@pytest.mark.usefixtures("backend", "chunks", "road")
@pytest.mark.parametrize("name", ["all", "depthwise", "groups", "1x1", "conv1d"])
def test_conv_of_views_into_a_channels_last_score(name):
    """Slices of wider tensors, an expanded gradient, a score whose weight is channels_last."""
    shape, grad, x, options = convolution(name, torch.float32)
    wider = torch.randn(x.shape[0], x.shape[1] + 3, x.shape[2] + 2, 2 * x.shape[3])
    x = wider[:, 2:-1, 1:-1, ::2]
    grad = grad[:, :1, :, :1].expand(grad.shape)
    score = torch.rand(shape).contiguous(memory_format=torch.channels_last)
    check_conv(score, grad, x, options, 2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["plain", "groups", "depthwise", "1x1", "1x1 of one pixel"])
def test_conv_of_no_samples(name):
    shape, grad, x, options = convolution(name, torch.float32)
    score = torch.rand(shape)
    before = score.clone()
    accumulate.add_conv(score, grad[:0], x[:0], **options, power=2)
    assert torch.equal(score, before)


@pytest.mark.usefixtures("backend")
def test_long_depthwise_sums_are_exact():
    """A running sum over 224 x 224 positions would be off by 5e-6."""
    x, grad = (random(1, 2, 224, 224, dtype=torch.float32, seed=seed) for seed in range(2))
    score = torch.zeros(2, 1, 3, 3)
    accumulate.add_conv(score, grad, x, (1, 1), (1, 1), (1, 1), 2, 2)
    truth = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    padded = torch.nn.functional.pad(x[0].double(), (1, 1, 1, 1))
    for r, s in itertools.product(range(3), range(3)):
        window = padded[:, r : r + 224, s : s + 224]
        truth[:, 0, r, s] = (window * grad[0].double()).sum((1, 2)).square()
    assert torch.linalg.norm(score - truth) <= 2e-6 * torch.linalg.norm(truth)


# ---- memory ------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Bytes of the tensors made inside that live at once, at most; not what an op makes inside."""

    def __init__(self):
        super().__init__()
        self.made, self.bytes = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        self.made = {
            storage: [ref for ref in refs if ref() is not None]
            for storage, refs in self.made.items()
            if any(ref() is not None for ref in refs)
        }
        for result in _tensors(results):  # views too: they keep their storage alive
            if _storage(result) not in given or _storage(result) in self.made:
                self.made.setdefault(_storage(result), []).append(weakref.ref(result))
        self.bytes = max(self.bytes, sum(size for _, size in self.made))
        return results


def _tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _storage(tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_holds_a_tile_not_the_samples_gradients(dtype):
    """24 samples of a weight of 12.6 MB would take 300 MB."""
    score = torch.zeros(2048, 1536)
    operands = packed([4] * 24, *score.shape, dtype)
    with Peak() as peak:
        accumulate.add_linear(score, *operands, 2)
    assert 2**20 < peak.bytes < 5e6


IMAGES = torch.randn(1024, 64, 6, 6)
ROWS = IMAGES.view(-1, 64)
BOUNDS = torch.arange(0, len(ROWS), 4), torch.arange(0, len(ROWS), 4) + 4
IN_PARTS = {
    "linear": lambda: accumulate.add_linear(torch.zeros(64, 64), ROWS, ROWS, *BOUNDS, 2),
    "single rows": lambda: accumulate.add_linear(torch.zeros(64, 64), ROWS, ROWS, None, None, 2),
    "sum": lambda: accumulate.add_sum(
        torch.zeros(64), *[ROWS.view(1024, -1, 64)] * 2, *torch.rand(2, 1024, 36, 1), 2
    ),
    "conv": lambda: _conv((64, 64, 3, 3), 1),
    "conv of large images": lambda: _conv((64, 64, 3, 3), 1, IMAGES.view(4, 64, 96, 96)),
    "conv1d": lambda: _conv((64, 64, 1, 9), 1, IMAGES.view(4, 64, 1, -1)),
    "groups": lambda: _conv((64, 16, 3, 3), 4),
    "depthwise": lambda: _conv((64, 1, 3, 3), 64),
    "1x1": lambda: _conv((64, 64, 1, 1), 1),
}


def _conv(shape, groups, images=IMAGES):
    score = torch.zeros(shape)
    pad = shape[2] // 2, shape[3] // 2
    accumulate.add_conv(score, images, images, (1, 1), pad, (1, 1), groups, 2)


@pytest.mark.parametrize("name", IN_PARTS)
def test_what_is_held_does_not_grow_with_the_batch(name):
    """9.4 MB of images; gradients of 16 to 150 MB, windows of 85 MB, of one image 21 MB."""
    with Peak() as peak:
        IN_PARTS[name]()
    assert peak.bytes < 14e6
