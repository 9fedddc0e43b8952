"""Rows in other orders than one block for each sample: time first, flattened, sorted, routed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .case import (
    MEETS_DATA,
    SORTED,
    Calls,
    Case,
    classify,
    images,
    parameter,
    per_sample,
    sequences,
    vectors,
)  # fmt: skip


def flattened_tokens():
    def run(self, x):
        flat = torch.tanh(self.inner(self.norm(x).flatten(0, 1)))
        return self.head(flat.unflatten(0, x.shape[:2]))

    model = Calls(run, norm=nn.LayerNorm(8), inner=nn.Linear(8, 6), head=nn.Linear(6, 3))
    return Case(model, sequences(3, 2), per_sample)


def flattened_time_first():
    """[T * B]: all samples, then all samples again."""

    def run(self, x):
        steps, size = x.shape[1], len(x)
        flat = torch.tanh(self.norm(self.inner(x.transpose(0, 1).flatten(0, 1))))
        return self.head(flat.unflatten(0, (steps, size)).mean(0))

    model = Calls(run, norm=nn.LayerNorm(6), inner=nn.Linear(8, 6), head=nn.Linear(6, 3))
    return Case(model, sequences(3, 2), per_sample)


def time_first(length=4):
    """Tokens [T, B]: dim 0 is never the sample but in the head."""

    def run(self, tokens):
        x = torch.tanh(self.inner(self.norm(self.embedding(tokens))) * self.scale)
        return self.head(x.cumsum(0)[-1])

    def take(batch, b):
        tokens, labels = batch
        return (tokens[:, b : b + 1], labels[b : b + 1]) if b < len(labels) else None

    model = Calls(
        run, embedding=nn.Embedding(11, 6), norm=nn.LayerNorm(6), inner=nn.Linear(6, 5),
        scale=parameter(5), head=nn.Linear(5, 4),
    )  # fmt: skip
    # T == B in the first batch, by accident.
    batches = [(torch.randint(0, 11, (length, b)), torch.randint(0, 4, (b,))) for b in (4, 3, 5)]
    return Case(model, batches, classify, roads={"scale": MEETS_DATA}, take=take)


def frames():
    """Frames of a video are images of one batch; their features are averaged."""

    def run(self, x):
        size, length = x.shape[:2]
        x = x.flatten(0, 1)
        x = torch.tanh(self.norm(self.conv(x)) * self.scale)
        x = self.second(x).mean((2, 3)).unflatten(0, (size, length))
        return self.head(self.mix(x).mean(1))

    model = Calls(
        run, conv=nn.Conv2d(3, 6, 3, stride=2), norm=nn.GroupNorm(2, 6), mix=nn.Linear(5, 5),
        second=nn.Conv2d(6, 5, 2), head=nn.Linear(5, 4), scale=parameter(1, 6, 1, 1),
    )  # fmt: skip
    batches = [(torch.randn(b, t, 3, 7, 7), torch.randint(0, 4, (b,))) for b, t in ((3, 4), (2, 5))]
    return Case(model, batches, classify, roads={"scale": MEETS_DATA})


def samples_in_another_order():
    """A layer that sees the samples in another order than the losses."""

    def run(self, x):
        return self.head(self.turned(torch.tanh(self.first(x)).flip(0)).flip(0))

    layers = {name: nn.Linear(6, n) for name, n in (("first", 6), ("turned", 6), ("head", 4))}
    return Case(Calls(run, **layers), vectors(4, 3), classify, roads={"turned.*": SORTED})


def sorted_by_length():
    """A layer sees the samples as they are and by length, in an order of its own in every batch."""

    def run(self, x):
        order = x[:, 0].argsort()
        sorted_by_it = torch.tanh(self.body(x[order]))
        return self.head(self.body(sorted_by_it[order.argsort()]))

    model = Calls(run, body=nn.Linear(6, 6), head=nn.Linear(6, 4))
    case = Case(model, vectors(4, 4, 5), classify, roads={"body.*": SORTED})
    x, _ = case.batches[0]
    x[:, 0] = torch.arange(len(x))  # sorted already, which must not be believed of the next
    return case


def routed_samples():
    """Experts that see some of the samples only, and now and then all of them."""

    def run(self, x):
        out = torch.zeros_like(x)
        for expert, mine in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            out = out.index_put((mine,), expert(x[mine]))
        return self.head(out)

    experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
    case = Case(
        Calls(run, experts=experts, head=nn.Linear(6, 4)), vectors(3, 5, 4), classify,
        roads={"experts.*": SORTED},
    )  # fmt: skip
    case.batches[0][0][:, 0].abs_()
    return case


def packed_sequences(first=(3, 5, 1, 4)):
    """Samples of different length as one row of tokens, with the sample of each beside it."""

    def run(self, tokens, samples, size):
        x = torch.tanh(self.inner(self.norm(self.embedding(tokens))))
        sums = x.new_zeros(size, 6).index_add(0, samples, x)
        return self.head(sums / torch.bincount(samples, minlength=size).unsqueeze(1))

    def loss_fn(model, batch):
        tokens, samples, labels = batch
        logits = model(tokens, samples, len(labels))
        return F.cross_entropy(logits, labels, reduction="none")

    def take(batch, b):
        tokens, samples, labels = batch
        mine = samples == b
        if b >= len(labels):
            return None
        return tokens[mine], torch.zeros_like(samples[mine]), labels[b : b + 1]

    model = Calls(
        run, embedding=nn.Embedding(11, 6), norm=nn.LayerNorm(6), inner=nn.Linear(6, 6),
        head=nn.Linear(6, 4),
    )  # fmt: skip
    batches = []
    for lengths in (first, (2, 6), (4, 4, 4), (5, 3, 4)):
        samples = torch.repeat_interleave(torch.tensor(lengths))
        labels = torch.randint(0, 4, (len(lengths),))
        batches.append((torch.randint(0, 11, (len(samples),)), samples, labels))
    roads = {"head.*": "batched", "*": SORTED}
    return Case(model, batches, loss_fn, roads=roads, take=take)


def packed_crops():
    """Bags of crops, each with the sample's number; in the first batch every bag holds one."""

    def run(self, x, samples, size):
        x = torch.tanh(self.inner(x))
        return self.head(x.new_zeros(size, *x.shape[1:]).index_add(0, samples, x)).mean(1)

    def loss_fn(model, batch):
        crops, samples, labels = batch
        return F.cross_entropy(model(crops, samples, len(labels)), labels, reduction="none")

    def take(batch, b):
        crops, samples, labels = batch
        mine = samples == b
        one = (crops[mine], torch.zeros_like(samples[mine]), labels[b : b + 1])
        return one if b < len(labels) else None

    batches = []
    for bags in ((1, 1, 1), (1, 2, 0), (0, 1, 2), (2, 2)):
        samples = torch.repeat_interleave(torch.tensor(bags))
        batches.append(
            (torch.randn(len(samples), 2, 6), samples, torch.randint(0, 4, (len(bags),)))
        )
    model = Calls(run, inner=nn.Linear(6, 6), head=nn.Linear(6, 4))
    return Case(model, batches, loss_fn, roads={"inner.*": SORTED}, take=take)


def one_layer_in_two_orders(flat):
    """A layer sees [B, T] and then [T, B]; flat, it sees samples in blocks, then in a cycle."""

    def run(self, x):
        size, length = x.shape[:2]
        x = torch.tanh(self.layer(x.flatten(0, 1) if flat else x)).view(size, length, -1)
        x = x.transpose(0, 1)
        x = self.layer(x.flatten(0, 1) if flat else x).view(length, size, -1)
        return x.transpose(0, 1)

    batches = [torch.randn(3, 5, 4), torch.randn(5, 5, 4), torch.randn(2, 5, 4)]
    return Case(Calls(run, layer=nn.Linear(4, 4)), batches, per_sample)


def graphs():
    """A graph network: nodes of all graphs in one batch, edges between them, sums by graph."""

    def run(self, x, edges, graphs, size):
        for layer in (self.first, self.second):
            messages = torch.tanh(layer(torch.cat([x[edges[0]], x[edges[1]]], 1)))
            x = torch.zeros_like(x).index_add(0, edges[1], messages) + self.own(x) * self.keep
        return self.head(x.new_zeros(size, 6).index_add(0, graphs, x))

    def loss_fn(model, batch):
        x, edges, graphs, labels = batch
        out = model(x, edges.long(), graphs.long(), len(labels))
        return F.cross_entropy(out, labels, reduction="none")

    def take(batch, b):
        x, edges, graphs, labels = batch
        if b >= len(labels):
            return None
        mine = graphs == b
        first = int(mine.nonzero()[0])
        return x[mine], edges[:, mine[edges[0]]] - first, graphs[mine] - b, labels[b : b + 1]

    model = Calls(
        run, first=nn.Linear(12, 6), second=nn.Linear(12, 6), own=nn.Linear(6, 6),
        keep=parameter(6), head=nn.Linear(6, 4),
    )  # fmt: skip
    batches = []
    for nodes in ((3, 5, 2), (4, 4)):
        graphs = torch.repeat_interleave(torch.tensor(nodes))
        starts = torch.cumsum(torch.tensor((0, *nodes[:-1])), 0)
        pairs = [torch.randint(0, n, (2, 2 * n)) + s for n, s in zip(nodes, starts, strict=True)]
        x, labels = torch.randn(len(graphs), 6), torch.randint(0, 4, (len(nodes),))
        batches.append((x, torch.cat(pairs, 1), graphs, labels))
    roads = {"head.*": "batched", "*": SORTED}
    return Case(model, batches, loss_fn, roads=roads, take=take)


def several_rows_of_features():
    """Rows in two dims, the sample in the second: a layer over [T, B, H]."""

    def run(self, x):
        x = self.inner(x.permute(1, 0, 2, 3))
        x = self.norm(torch.tanh(x))
        return self.head(x).mean((0, 2))

    model = Calls(run, inner=nn.Linear(8, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 3))
    return Case(model, [torch.randn(b, 3, 2, 8) for b in (4, 3, 2)], per_sample)


def batch_norm_of_flattened_tokens():
    def run(self, x):
        return self.head(self.norm(self.inner(x).flatten(0, 1)).unflatten(0, x.shape[:2]))

    model = Calls(run, inner=nn.Linear(8, 6), norm=nn.BatchNorm1d(6), head=nn.Linear(6, 3))
    return Case(model, sequences(4, 3), per_sample)


def several_losses_of_one_image():
    """Crops of an image go through as a batch of their own, before samples are gathered again."""

    def run(self, x):
        crops = torch.cat([x[:, :, :6, :6], x[:, :, 3:, 3:], x[:, :, 1:7, 2:8]])
        features = self.trunk(crops).view(3, len(x), -1)
        return self.head(features.amax(0))

    trunk = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Case(Calls(run, trunk=trunk, head=nn.Linear(5, 4)), images(4, 3), classify)


ROWS: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        flattened_tokens, flattened_time_first, time_first, frames, samples_in_another_order,
        sorted_by_length, routed_samples, packed_sequences, packed_crops, graphs,
        several_rows_of_features, batch_norm_of_flattened_tokens, several_losses_of_one_image,
    )
}  # fmt: skip
ROWS |= {
    "time_first_of_three": functools.partial(time_first, 3),
    "packed_sequences_of_one_length_first": functools.partial(packed_sequences, (4, 4, 4)),
    "one_layer_in_two_orders": functools.partial(one_layer_in_two_orders, False),
    "one_flat_layer_in_two_orders": functools.partial(one_layer_in_two_orders, True),
}
