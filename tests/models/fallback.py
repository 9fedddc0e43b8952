"""Calls without a rule: the audit must find them, and the fallback be exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .case import Calls, Case, classify, parameter, per_sample, sequences, vectors
from .ruled import checkpointed


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def custom_function():
    def run(self, x):
        inner = F.linear(torch.tanh(x), Scaled.apply(self.inner.weight), self.inner.bias)
        return self.outer(inner)

    model = Calls(run, inner=nn.Linear(6, 6), outer=nn.Linear(6, 4))
    return Case(model, vectors(3, 2), classify, {"inner.weight", "inner.bias"})


class ScaledProduct(torch.autograd.Function):
    """A fused layer of another library: the product and its gradients are its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T * 3

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight * 3, (grad.T @ x) * 3


def custom_function_of_data_and_weight():
    def run(self, x):
        return self.outer(ScaledProduct.apply(torch.tanh(self.inner(x)), self.weight))

    model = Calls(run, inner=nn.Linear(6, 6), outer=nn.Linear(5, 4), weight=parameter(5, 6))
    return Case(model, vectors(3, 2), classify, {"weight"})


def checkpointed_with_fallback():
    case = checkpointed()
    case.model.blocks[0][1] = nn.PReLU(6)
    case.fallback = {"blocks.0.1.weight"}
    return case


def other_layers():
    def run(self, x):
        x = self.act(self.up(self.conv(x.transpose(1, 2)))).mean(2)
        return self.pair(x, x)

    model = Calls(
        run, conv=nn.Conv1d(8, 6, 3), up=nn.ConvTranspose1d(6, 5, 2), act=nn.PReLU(5),
        pair=nn.Bilinear(5, 5, 4),
    )  # fmt: skip
    names = {name for name, _ in model.named_parameters() if name.startswith(("act", "pair"))}
    return Case(model, sequences(3, 2), per_sample, names)


def recurrent_time_first():
    def run(self, x):
        return self.head(self.gru(self.inner(x).transpose(0, 1))[0][-1])

    model = Calls(run, inner=nn.Linear(8, 6), gru=nn.GRU(6, 5), head=nn.Linear(5, 4))
    names = {name for name, _ in model.named_parameters() if name.startswith("gru")}
    return Case(model, sequences(4, 3), per_sample, names)


def products_by_einsum():
    """Attention's projections as Einstein sums of data and 3-D weights."""

    def run(self, x):
        x = torch.einsum("btd,dhk->bthk", self.inner(x), self.heads)
        return torch.einsum("bthk,hkd->btd", torch.tanh(x), self.out)

    model = Calls(run, inner=nn.Linear(8, 8), heads=parameter(8, 2, 3), out=parameter(2, 3, 5))
    return Case(model, sequences(4, 3), per_sample, {"heads", "out"})


def features_first():
    """Features first: [D, B] columns are samples, through a product from the left."""

    def run(self, x):
        return (self.second @ torch.tanh(self.first @ x.T)).T

    model = Calls(run, first=parameter(5, 6), second=parameter(4, 5))
    return Case(model, vectors(5, 3), classify, {"first", "second"})


def mixed_samples_before_a_batched_head():
    """Samples are compared with their batch in the middle: what is below is not batched.

    Each loss's own gradient is what it is, in the batch that it came in.
    """

    def run(self, x):
        x = torch.tanh(self.body(x))
        return self.head(x - x.mean(0))

    model = Calls(run, body=nn.Linear(6, 6), head=nn.Linear(6, 4))
    return Case(model, vectors(4, 3), classify, {"body.weight", "body.bias"})


FALLBACK: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        custom_function, custom_function_of_data_and_weight, checkpointed_with_fallback,
        other_layers, recurrent_time_first, products_by_einsum,
        features_first,
    )
}  # fmt: skip
