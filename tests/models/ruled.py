"""Calls that have a rule: everything must be batched."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .case import Case, classify, images, per_sample, sequences, token_ids, vectors


def mlp():
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.Linear(5, 4))
    return Case(model, vectors(5, 3, 1), classify, set())


def linear_over_positions():
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3, bias=False))
    return Case(model, sequences(4, 2), per_sample, set())


def linear_over_a_grid():
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    return Case(model, [torch.randn(3, 2, 5, 8), torch.randn(2, 4, 3, 8)], per_sample, set())


def give_statistics(model):
    """Let batch norms have seen something: running statistics start at 0 and 1."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


def convnet_with_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4),
    )  # fmt: skip
    give_statistics(model)
    return Case(model, images(4, 3), classify, set())


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
    "conv_reflect": {"padding": 1, "padding_mode": "reflect"},
    "conv_everything": {
        "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2,
    },
}  # fmt: skip


def convolution(options):
    arguments = {"in_channels": 6, "out_channels": 6, "kernel_size": 3, **options}
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(**arguments))
    return Case(model, [x for x, _ in images(3, 2)], per_sample, set())


def conv_channels_last():
    case = convolution({"stride": 2})
    case.batches = [x.to(memory_format=torch.channels_last) for x in case.batches]
    return case


def layer_norms():
    model = nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 6), nn.LayerNorm((5, 6)),
        nn.LayerNorm(6, bias=False), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2),
    )  # fmt: skip
    return Case(model, sequences(4, 3), per_sample, set())


def layer_norm_of_vectors():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))
    return Case(model, vectors(4, 3), classify, set())


def batch_norms():
    model = nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False),
        nn.Unflatten(1, (2, 3)), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    give_statistics(model)
    return Case(model, vectors(4, 3), classify, set())


class TokenClassifier(nn.Module):
    def __init__(self, **embedding):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, **embedding)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)).mean(1))


def embedding(**options):
    batches = [(tokens, torch.randint(0, 4, (len(tokens),))) for tokens in token_ids(4, 3, 1)]
    batches[0][0][1] = 2  # one token seven times
    batches[0][0][2] = 0  # nothing but padding, where that is 0
    return Case(TokenClassifier(**options), batches, classify, set())


def embedding_of_padding_only():
    case = embedding(padding_idx=0)
    for tokens, _ in case.batches:
        tokens.zero_()
    return case


def embedding_called_with_negative_padding():
    class Functional(TokenClassifier):
        def forward(self, tokens):
            rows = F.embedding(tokens.int(), self.embedding.weight, padding_idx=-9)
            return self.head(self.norm(rows).mean(1))

    case = embedding()
    case.model.__class__ = Functional
    return case


def half_frozen():
    case = convnet_with_norms()
    case.model[0].weight.requires_grad_(False)
    case.model[1].requires_grad_(False)
    case.model[5].bias.requires_grad_(False)
    return case


def biases_only():
    case = mlp()
    for name, p in case.model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return case


def residual_in_place():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            out = self.inner(x)
            out += x
            out.relu_()
            return self.outer(out)

    return Case(Residual(), vectors(4, 2), classify, set())


def zero_head():
    """A head that starts at zero hides the layers below it in the first look at them."""
    case = mlp()
    with torch.no_grad():
        case.model[3].weight.zero_()
    return case


def called_by_keywords():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.conv = nn.Linear(6, 6), nn.LayerNorm(6), nn.Conv2d(1, 4, 2)

        def forward(self, x):
            x = F.linear(bias=self.linear.bias, weight=self.linear.weight, input=x)
            x = F.layer_norm(
                weight=self.norm.weight, input=x, normalized_shape=[6], bias=self.norm.bias
            )
            x = x.view(-1, 1, 2, 3)
            return F.conv2d(
                stride=2, weight=self.conv.weight, input=x, bias=self.conv.bias
            ).flatten(1)

    return Case(Keywords(), vectors(4, 3), classify, set())


def unused_branch():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)
            self.bare = nn.Parameter(torch.randn(3))

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    return Case(Branches(), vectors(3, 2), classify, set())


def checkpointed():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(2)
            )
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    return Case(Checkpointed(), vectors(4, 3), classify, set())


RULED: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        mlp, linear_over_positions, linear_over_a_grid, convnet_with_norms, conv_channels_last,
        layer_norms, layer_norm_of_vectors, batch_norms, embedding, embedding_of_padding_only,
        embedding_called_with_negative_padding, half_frozen, biases_only, residual_in_place,
        zero_head, called_by_keywords, unused_branch, checkpointed,
    )
}  # fmt: skip
RULED |= {name: functools.partial(convolution, options) for name, options in CONVOLUTIONS.items()}
RULED |= {
    "embedding_padding": functools.partial(embedding, padding_idx=0),
    "embedding_padding_from_the_end": functools.partial(embedding, padding_idx=-9),
    "embedding_sparse": functools.partial(embedding, sparse=True),
}
