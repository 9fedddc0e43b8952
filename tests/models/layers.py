"""Convolutions and normalisations: batched as they are, dim 0 the sample."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .case import Calls, Case, classify, images, parameter, per_sample, sequences, vectors


def give_statistics(model):
    """Let batch norms have seen something: running statistics start at 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


def convnet_with_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4),
    )  # fmt: skip
    give_statistics(model)
    return Case(model, images(4, 3), classify)


CONVOLUTIONS = {
    "conv_stride": {"stride": 2},
    "conv_stride_that_leaves_a_rest": {"stride": (3, 2), "kernel_size": (2, 3)},
    "conv_padding": {"padding": (2, 1)},
    "conv_dilation": {"dilation": (2, 3), "padding": 2},
    "conv_groups": {"groups": 3, "out_channels": 9},
    "conv_depthwise": {"groups": 6},
    "conv_depthwise_multiplied": {"groups": 6, "out_channels": 12},
    "conv_1x1": {"kernel_size": 1},
    "conv_1x1_stride": {"kernel_size": 1, "stride": 2, "bias": False},
    "conv_everything": {
        "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2,
    },
    "conv_reflect": {"padding": 1, "padding_mode": "reflect"},
    "conv_circular": {"padding": (1, 2), "padding_mode": "circular"},
    "conv_replicate": {"padding": (2, 0), "padding_mode": "replicate", "groups": 2},
    "conv_same_padding": {"padding": "same"},
    "conv_same_even": {"padding": "same", "kernel_size": (2, 4), "dilation": (1, 3)},
    "conv_same_reflect": {"padding": "same", "padding_mode": "reflect", "kernel_size": 4},
    "conv_valid_padding": {"padding": "valid", "dilation": 2},
    "conv_of_the_whole_image": {"kernel_size": 9},
    "conv1d": {"dims": 1},
    "conv1d_everything": {"dims": 1, "stride": 2, "padding": 3, "dilation": 2, "groups": 3},
    "conv1d_depthwise_causal": {"dims": 1, "kernel_size": 4, "padding": 3, "groups": 6},
    "conv1d_same_even": {"dims": 1, "kernel_size": 4, "padding": "same"},
    "conv1d_circular": {"dims": 1, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "conv1d_1x1": {"dims": 1, "kernel_size": 1, "bias": False},
    "conv3d": {"dims": 3, "padding": (1, 0, 1)},
    "conv3d_everything": {
        "dims": 3, "kernel_size": (1, 3, 2), "stride": (1, 2, 1), "padding": (0, 1, 2), "groups": 2,
    },
    "conv3d_depthwise": {"dims": 3, "groups": 6, "dilation": (1, 2, 1)},
    "conv3d_same_even": {"dims": 3, "kernel_size": (2, 1, 4), "padding": "same"},
    "conv3d_replicate": {"dims": 3, "padding": 1, "padding_mode": "replicate"},
}  # fmt: skip


def convolution(options):
    options = {"in_channels": 6, "out_channels": 6, "kernel_size": 3, **options}
    dims = options.pop("dims", 2)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(kind(3, 6, 1), nn.Tanh(), kind(**options))
    side = (17, 9, 6)[dims - 1]
    return Case(model, [x for x, _ in images(3, 2, side=side, dims=dims)], per_sample)


def conv_channels_last():
    case = convolution({"stride": 2})
    case.batches = [x.to(memory_format=torch.channels_last) for x in case.batches]
    return case


def conv_weight_channels_last():
    case = conv_channels_last()
    case.model.to(memory_format=torch.channels_last)
    return case


def patches():
    """A vision transformer's patch embedding; the images are no tensors with a gradient."""
    model = Calls(
        lambda self, x: self.head(torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)),
        conv=nn.Conv2d(3, 8, 3, stride=3), head=nn.Linear(8, 3),
    )  # fmt: skip
    return Case(model, [x for x, _ in images(4, 3)], per_sample)


def layer_norms():
    model = nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 6), nn.LayerNorm((5, 6)),
        nn.LayerNorm(6, bias=False), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2),
    )  # fmt: skip
    return Case(model, sequences(4, 3), per_sample)


def layer_norm_of_vectors():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))
    return Case(model, vectors(4, 3), classify)


def layer_norm_of_channels():
    """ConvNeXt's: the channels of an image are turned to the end, and back."""

    def run(self, x):
        x = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.last(torch.tanh(x))

    model = Calls(run, conv=nn.Conv2d(3, 6, 3), norm=nn.LayerNorm(6), last=nn.Conv2d(6, 4, 1))
    return Case(model, [x for x, _ in images(4, 3)], per_sample)


def rms_norms():
    model = nn.Sequential(
        nn.RMSNorm(8), nn.Linear(8, 6), nn.RMSNorm((5, 6), eps=1e-3), nn.Linear(6, 6),
        nn.RMSNorm(6, elementwise_affine=False), nn.Linear(6, 3),
    )  # fmt: skip
    return Case(model, sequences(4, 3), per_sample)


def group_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Tanh(), nn.Conv2d(8, 6, 1), nn.GroupNorm(1, 6),
        nn.Tanh(), nn.GroupNorm(6, 6, eps=1e-3), nn.GroupNorm(2, 6, affine=False),
    )  # fmt: skip
    return Case(model, [x for x, _ in images(4, 3)], per_sample)


def group_norm_of_vectors():
    model = nn.Sequential(nn.Linear(6, 6), nn.GroupNorm(2, 6), nn.Linear(6, 4))
    return Case(model, vectors(4, 3), classify)


def instance_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.Tanh(), nn.Conv2d(6, 5, 1),
        nn.InstanceNorm2d(5, affine=True, track_running_stats=True), nn.InstanceNorm2d(5),
        nn.Flatten(2), nn.InstanceNorm1d(5, affine=True), nn.Linear(49, 3),
    )  # fmt: skip
    give_statistics(model)
    return Case(model, [x for x, _ in images(4, 3)], per_sample)


def batch_norms():
    model = nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False),
        nn.Unflatten(1, (2, 3)), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    give_statistics(model)
    return Case(model, vectors(4, 3), classify)


def norms_of_volumes():
    model = nn.Sequential(
        nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), nn.Tanh(), nn.GroupNorm(3, 6), nn.Conv3d(6, 3, 1)
    )
    give_statistics(model)
    return Case(model, [torch.randn(b, 2, 4, 3, 5) for b in (3, 2)], per_sample)


def norms_called_with_half_their_weights():
    """Weight without bias and bias without weight."""

    def run(self, x):
        x = F.layer_norm(self.linear(x), (6,), None, self.a)
        x = F.layer_norm(torch.tanh(x), (6,), self.b).transpose(1, 2)
        mean, var = torch.linspace(-1, 1, 6).to(x), torch.linspace(0.5, 2, 6).to(x)
        x = torch.tanh(F.batch_norm(x, mean, var, None, self.c))
        return F.group_norm(F.batch_norm(x, mean, var, self.d), 2, self.e)

    weights = {name: parameter(6) for name in "abcde"}
    return Case(Calls(run, linear=nn.Linear(8, 6), **weights), sequences(4, 3), per_sample)


def transposed_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.Tanh(),
        nn.ConvTranspose2d(6, 2, 2, bias=False),
    )  # fmt: skip
    return Case(model, [torch.randn(b, 3, 4, 4) for b in (3, 2)], per_sample)


LAYERS: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        convnet_with_norms, transposed_convolutions, conv_channels_last,
        conv_weight_channels_last, patches, layer_norms, layer_norm_of_vectors,
        layer_norm_of_channels, rms_norms, group_norms,
        group_norm_of_vectors, instance_norms, batch_norms, norms_of_volumes,
        norms_called_with_half_their_weights,
    )
}  # fmt: skip
LAYERS |= {name: functools.partial(convolution, options) for name, options in CONVOLUTIONS.items()}
