"""Transposed convolutions against a loop over single samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import assert_as_exact_as_a_loop, score, truth
from models import Calls, Case, parameter
from torch import nn

KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OPTIONS = {
    "plain": {},
    "stride": {"stride": 2},
    "upsampling": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"dilation": 2, "padding": 1},
    "stride-above-the-kernel": {"stride": 4, "output_padding": 3},
    "groups": {"groups": 2, "stride": 2, "padding": 1},
    "depthwise": {"groups": 4, "bias": False},
    "dilation-above-the-stride": {"dilation": 3, "stride": 2, "output_padding": 1},
}


def squares(model, batch):
    out = model(batch[0]).flatten(1)
    weights = torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)
    return (out.square() * weights).mean(1)


def case_of(model, dims, sizes=(3, 1, 4), length=5):
    generator = torch.Generator().manual_seed(dims)
    shapes = [(n, 4, *range(length, length - dims, -1)) for n in sizes]
    return Case(model, [(torch.randn(shape, generator=generator),) for shape in shapes], squares)


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dims", KINDS)
def test_transposed_convolutions_are_batched_and_exact(dims, options, power):
    torch.manual_seed(0)
    kernel = (3, 2, 3)[:dims]
    layer = KINDS[dims](4, 4, kernel, **OPTIONS[options])
    below = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](4, 4, 1)
    case = case_of(nn.Sequential(below, nn.Tanh(), layer), dims)
    fisher = score(case, power=power)
    exact, plain = (truth(case, t, power=power) for t in (torch.float64, torch.float32))
    assert_as_exact_as_a_loop(fisher, exact, plain, power)
    assert not fisher.fallback


def test_a_given_output_size():
    layer = nn.ConvTranspose2d(4, 3, 3, stride=3)
    case = case_of(Calls(lambda self, x: self.layer(x, output_size=(16, 13)), layer=layer), 2)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert not fisher.fallback


def test_one_weight_in_a_convolution_and_transposed():
    """An autoencoder with tied weights: both uses are summed before the square."""

    def run(self, x):
        hidden = torch.tanh(F.conv2d(x, self.w, stride=2, padding=1))
        return F.conv_transpose2d(hidden, self.w, stride=2, padding=1, output_padding=(0, 1))

    case = case_of(Calls(run, w=parameter(6, 4, 3, 3)), 2)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert not fisher.fallback


def test_more_output_padding_than_stride_is_left_to_autograd():
    """Then the convolution back has more positions than the input."""
    layer = nn.ConvTranspose2d(4, 3, 2, stride=1, dilation=3, output_padding=2)
    case = case_of(layer, 2)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert set(fisher.fallback) == {"weight", "bias"}


@pytest.mark.parametrize("unbatched", [False, True], ids=["batch", "image-by-image"])
def test_images_without_a_batch_dim(unbatched):
    layer = nn.ConvTranspose2d(4, 3, 3, stride=2)

    def run(self, x):
        return torch.stack([self.layer(image) for image in x]) if unbatched else self.layer(x)

    case = case_of(Calls(run, layer=layer), 2)
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))
