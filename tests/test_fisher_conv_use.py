"""A convolution's use: lines, volumes and several images a sample as convolutions in 2 dims."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fishfast.fisher.engine import uses_conv
from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.rows import Layout, Rows
from fishfast.fisher.engine.uses_conv import ConvUse, Window

# Channels, side by dim, outputs, kernel, and what is not 1, 0, 1, 1.
CONVS = {
    "1d": (4, (11,), 6, (3,), {"padding": (1,), "stride": (2,)}),
    "2d": (3, (7, 6), 5, (3, 2), {"padding": (1, 0)}),
    "2d, uneven rows": (3, (8, 6), 5, (3, 3), {"stride": (3, 2), "padding": (1, 1)}),
    "2d, far windows": (2, (9, 9), 4, (2, 3), {"stride": (2, 1), "dilation": (3, 2)}),
    "2d, few windows": (2, (9, 4), 4, (3, 3), {"stride": (5, 5)}),
    "2d, groups": (4, (6, 6), 6, (3, 3), {"padding": (1, 1), "groups": 2}),
    "2d, depthwise": (4, (6, 6), 8, (3, 3), {"padding": (1, 1), "groups": 4}),
    "3d": (3, (5, 6, 7), 4, (3, 2, 3), {"padding": (1, 0, 1)}),
    "3d, all": (
        4, (9, 8, 7), 6, (2, 3, 2),
        {"stride": (2, 3, 1), "padding": (1, 2, 1), "dilation": (3, 1, 2), "groups": 2},
    ),
    "3d, depthwise": (4, (5, 5, 5), 4, (3, 3, 3), {"groups": 4}),
    "3d, 1x1x1": (3, (2, 3, 4), 5, (1, 1, 1), {}),
}  # fmt: skip


def use_and_truth(name, images, power):
    """Three samples of some images each, one after another in dim 0."""
    channels, sides, num_out, kernel, options = CONVS[name]
    dims = len(sides)
    options = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims, "groups": 1,
               **options}  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3 * images, channels, *sides, generator=generator)
    weight = torch.randn(num_out, channels // options["groups"], *kernel, generator=generator)
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    grad = torch.randn(conv(x, weight, **options).shape, generator=generator)
    truth = torch.zeros(weight.shape, dtype=torch.float64)
    for g, a in zip(grad.double().split(images), x.double().split(images), strict=True):
        leaf = weight.double().requires_grad_()
        (of_sample,) = torch.autograd.grad(conv(a, leaf, **options), leaf, g)
        truth += of_sample.abs() ** power
    layout = Layout("dim") if images == 1 else Layout("blocks")
    use = ConvUse(Rows((3 * images,), 3, layout), grad, x, weight.shape, Window(**options))
    return use, truth


@pytest.mark.parametrize("held", ["all at once", "one volume at a time"])
@pytest.mark.parametrize("power", [1, 2], ids=["abs", "square"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("images", [1, 4], ids=["an image", "several images"])
@pytest.mark.parametrize("name", CONVS)
def test_scores_are_the_sums_over_samples(name, images, backend, power, held, monkeypatch):
    if held != "all at once":
        monkeypatch.setattr(uses_conv, "_HELD", 1)
    monkeypatch.setattr(ConvUse, "grads", None)  # no sample is scored by itself
    use, truth = use_and_truth(name, images, power)
    score = torch.ones(truth.shape)
    use.add_to(score, Accumulator(power, backend))
    torch.testing.assert_close(score.double() - 1, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["3d", "3d, all"])
def test_scores_of_a_weight_in_channels_last_order(name):
    use, truth = use_and_truth(name, 1, 2)
    score = torch.zeros(truth.shape).contiguous(memory_format=torch.channels_last_3d)
    use.add_to(score, Accumulator(2))
    torch.testing.assert_close(score.double(), truth, rtol=1e-5, atol=1e-5)
