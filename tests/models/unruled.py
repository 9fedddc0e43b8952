"""Calls without a rule: the fallback must find them and be exact."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from .case import Case, classify, next_token, per_sample, sequences, token_ids, vectors
from .ruled import checkpointed, convolution


def checkpointed_with_fallback():
    case = checkpointed()
    case.model.blocks[0][1] = nn.GroupNorm(2, 6)
    case.fallback = {"blocks.0.1.weight", "blocks.0.1.bias"}
    return case


def _fallback_conv(**options):
    case = convolution(options)
    case.fallback = {"2.weight", "2.bias"}
    return case


def tied_language_model():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(torch.tanh(self.inner(self.embedding(tokens))))

    return Case(Tied(), token_ids(3, 2), next_token, {"embedding.weight"})


def called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.norm(self.shared(torch.tanh(self.norm(self.shared(x))))))

    return Case(
        Twice(),
        vectors(3, 2),
        classify,
        {"shared.weight", "shared.bias", "norm.weight", "norm.bias"},
    )


def transformer_layer():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.layer(x))

    attention = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    return Case(Encoder(), sequences(3, 2), per_sample, {f"layer.self_attn.{n}" for n in attention})


def lstm():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 5, 2, batch_first=True), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model = Recurrent()
    return Case(
        model, sequences(3, 2), per_sample,
        {name for name, _ in model.named_parameters() if name.startswith("lstm")},
    )  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def other_norms():
    model = nn.Sequential(
        nn.Linear(8, 6), RMSNorm(6), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 6),
        nn.Unflatten(2, (6, 1)), nn.Flatten(1, 2), nn.GroupNorm(5, 30),
    )  # fmt: skip
    return Case(
        model, sequences(3, 2), per_sample, {"1.weight", "3.weight", "7.weight", "7.bias"}
    )  # fmt: skip


def weight_norm():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4))
    inner = {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}
    return Case(model, vectors(3, 2), classify, inner)


def bare_parameters():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(6))
            self.matrix, self.linear = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 6)

        def forward(self, x):
            return (self.linear(x) * self.scale + self.shift) @ self.matrix

    return Case(Bare(), vectors(3, 2), classify, {"scale", "shift", "matrix"})


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def custom_function():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            inner = F.linear(torch.tanh(x), Scaled.apply(self.inner.weight), self.inner.bias)
            return self.outer(inner)

    return Case(Custom(), vectors(3, 2), classify, {"inner.weight", "inner.bias"})


def views_of_a_weight():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(2, 4, 6))  # two weights in one parameter
            self.turned = nn.Parameter(torch.randn(4, 4))
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            out = torch.tanh(F.linear(x, self.stack[0]) + F.linear(x, self.stack[1]))
            return self.head(F.linear(out, self.turned.T))

    return Case(Views(), vectors(3, 2), classify, {"stack", "turned"})


def used_with_and_without_a_rule():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            penalty = 0.1 * self.linear.weight.square().sum() + self.linear.bias.abs().sum()
            return self.head(self.linear(x)) * (1 + penalty)

    return Case(Both(), vectors(3, 2), classify, {"linear.weight", "linear.bias"})


def other_layers():
    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = nn.Conv1d(8, 6, 3), nn.ConvTranspose1d(6, 5, 2)
            self.act, self.pair = nn.PReLU(5), nn.Bilinear(5, 5, 4)

        def forward(self, x):
            x = self.act(self.up(self.conv(x.transpose(1, 2)))).mean(2)
            return self.pair(x, x)

    model = Others()
    return Case(model, sequences(3, 2), per_sample, {name for name, _ in model.named_parameters()})


def embedding_bag():
    model = nn.Sequential(nn.EmbeddingBag(11, 6), nn.Linear(6, 4))
    return Case(model, token_ids(3, 2), per_sample, {"0.weight"})


UNRULED: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        checkpointed_with_fallback, tied_language_model, called_twice, transformer_layer, lstm,
        other_norms, weight_norm, bare_parameters, custom_function, views_of_a_weight,
        used_with_and_without_a_rule, other_layers, embedding_bag,
    )
}  # fmt: skip
UNRULED |= {"conv_same_padding": functools.partial(_fallback_conv, padding="same")}
