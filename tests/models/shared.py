"""Weights with several uses in a forward, or with several parts: summed before the square."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .case import (
    MEETS_DATA,
    Calls,
    Case,
    classify,
    next_token,
    parameter,
    per_sample,
    sequences,
    token_ids,
    vectors,
)  # fmt: skip


def tied_language_model(padding_idx=None, bias=False, scale=1.0):
    """Embedding and head are one matrix; tokens repeat, some are padding."""

    def run(self, tokens):
        x = torch.tanh(self.inner(self.embedding(tokens) * scale))
        return F.linear(x, self.embedding.weight, self.bias)

    model = Calls(
        run, embedding=nn.Embedding(11, 6, padding_idx), inner=nn.Linear(6, 6),
        bias=parameter(11) if bias else None,
    )  # fmt: skip
    batches = token_ids(3, 2)
    batches[0][1], batches[1][0, 3:] = 0, 0
    return Case(model, batches, next_token)


def tied_by_modules():
    case = tied_language_model()
    case.model = nn.Sequential(nn.Embedding(11, 6), nn.Tanh(), nn.Linear(6, 11, bias=False))
    case.model[2].weight = case.model[0].weight
    return case


def encoder_and_decoder_share_an_embedding():
    """As in T5 and BART: two lookups of other tokens, and the head."""

    def run(self, source, target):
        memory = torch.tanh(self.encoder(self.shared(source))).mean(1, keepdim=True)
        return self.decoder(self.shared(target) + memory) @ self.shared.weight.T

    def loss_fn(model, batch):
        source, target = batch
        logits = model(source, target[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), target[:, 1:], reduction="none").mean(1)

    model = Calls(
        run, shared=nn.Embedding(11, 6), encoder=nn.Linear(6, 6), decoder=nn.Linear(6, 6)
    )  # fmt: skip
    batches = list(zip(token_ids(3, 2), token_ids(3, 2, length=5), strict=True))
    return Case(model, batches, loss_fn)


def called_twice():
    def run(self, x):
        return self.head(self.norm(self.shared(torch.tanh(self.norm(self.shared(x))))))

    model = Calls(run, shared=nn.Linear(6, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 4))
    return Case(model, vectors(3, 2), classify)


def layers_called_again_and_again():
    """ALBERT: one block for all depths, over sequences."""

    def run(self, x):
        for _ in range(3):
            x = self.norm(x + self.down(F.gelu(self.up(x))))
        return self.head(x.mean(1))

    model = Calls(
        run, up=nn.Linear(8, 12), down=nn.Linear(12, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, 3)
    )  # fmt: skip
    return Case(model, sequences(4, 3, 1), per_sample)


def convolution_called_twice():
    def run(self, x):
        for _ in range(2):
            x = torch.tanh(self.norm(self.conv(x)))
        return x

    model = Calls(run, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.GroupNorm(3, 3))
    return Case(model, [torch.randn(b, 3, 5, 5) for b in (3, 2)], per_sample)


def two_towers():
    """One encoder for both halves of a sample; the second half is longer."""

    def run(self, left, right):
        return self.encoder(left).mean(1) * self.encoder(right).mean(1)

    encoder = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4))
    batches = list(zip(sequences(3, 2), sequences(3, 2, length=7), strict=True))
    return Case(
        Calls(run, encoder=encoder), batches, lambda model, batch: model(*batch).sum(1) ** 2
    )


def two_crops_in_one_batch():
    """As siamese networks do: all first views, then all second views, through one trunk."""

    def run(self, x, y):
        first, second = self.trunk(torch.cat([x, y])).chunk(2)
        return self.head(first * second)

    model = Calls(
        run, trunk=nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)), head=nn.Linear(6, 4)
    )  # fmt: skip
    batches = [(torch.randn(b, 6), torch.randn(b, 6)) for b in (4, 3)]
    return Case(model, batches, lambda model, batch: model(*batch).square().mean(1))


def used_as_matrix_and_as_rows():
    """A weight whose uses are of different kinds: linear, transposed, rows, convolution."""

    def run(self, x):
        tokens = (x[:, :2] > 0).long().sum(1, keepdim=True)
        x = F.linear(x, self.weight) @ self.weight + F.embedding(tokens, self.weight).sum(1)
        return torch.tanh(F.conv1d(x.unsqueeze(1), self.weight.unsqueeze(1)).mean(2))

    return Case(Calls(run, weight=parameter(6, 6)), vectors(4, 3), classify)


def views_of_a_weight():
    """Two weights in one parameter, and one that is used turned."""

    def run(self, x):
        out = torch.tanh(F.linear(x, self.stack[0]) + F.linear(x, self.stack[1]))
        return self.head(F.linear(out, self.turned.T))

    model = Calls(run, stack=parameter(2, 4, 6), turned=parameter(4, 4), head=nn.Linear(4, 4))
    return Case(model, vectors(3, 2), classify)


def views_that_overlap():
    """Rows that two slices share, a corner of them, every other row; and so for the bias."""

    def run(self, x):
        x = torch.tanh(F.linear(x, self.weight[:6], self.bias[:6]))
        x = F.linear(x[:, :3], self.weight[3:9, :3]) + F.linear(x, self.weight[::2])
        return x + self.bias[1:7]

    model = Calls(run, weight=parameter(12, 6), bias=parameter(9))
    return Case(model, vectors(4, 3), classify, roads={"bias": MEETS_DATA})


def split_projection():
    """Queries, keys and values of one matrix, split before the call and in chunks of it."""

    def run(self, x):
        q, k = (F.linear(x, w) for w in self.packed.split(8)[:2])
        v = F.linear(x, self.packed.chunk(3)[2], self.bias.unbind(0)[1])
        k = k + self.bias[0]
        return (q @ k.transpose(1, 2)).softmax(-1) @ v

    return Case(
        Calls(run, packed=parameter(24, 8), bias=parameter(2, 8)), sequences(4, 3), per_sample,
        roads={"bias": MEETS_DATA},
    )  # fmt: skip


def weight_used_by_itself_too():
    """A penalty on the weights is a part of every loss."""

    def run(self, x):
        penalty = 0.1 * self.linear.weight.square().sum() + self.linear.bias.abs().sum()
        return self.head(self.linear(x)) * (1 + penalty)

    model = Calls(run, linear=nn.Linear(6, 6), head=nn.Linear(6, 4))
    return Case(model, vectors(3, 2), classify, roads={"linear*": MEETS_DATA})


SHARED: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        tied_language_model, tied_by_modules, encoder_and_decoder_share_an_embedding, called_twice,
        layers_called_again_and_again, convolution_called_twice, two_towers, two_crops_in_one_batch,
        used_as_matrix_and_as_rows, views_of_a_weight, views_that_overlap, split_projection,
        weight_used_by_itself_too,
    )
}  # fmt: skip
SHARED |= {
    "tied_with_padding": functools.partial(tied_language_model, padding_idx=0),
    "tied_with_bias": functools.partial(tied_language_model, bias=True),
    "tied_and_scaled": functools.partial(tied_language_model, padding_idx=3, scale=2.5),
}
