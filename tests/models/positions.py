"""Positions, class tokens and queries: parameters that the samples share before they meet."""

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
    next_token,
    parameter,
    per_sample,
    sequences,
    token_ids,
)  # fmt: skip


def mix(x):
    """Causal: position t sees the mean of what came before it."""
    counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    return torch.tanh(x.cumsum(1) / counts.unsqueeze(1))


def positions(sizes, broadcast=False):
    """A table looked up by arange: its call has T rows, or 1, but never B."""

    def run(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        if broadcast:
            places = places.unsqueeze(0)
        return self.head(mix(self.tokens(tokens) + self.positions(places)))

    model = Calls(
        run, tokens=nn.Embedding(11, 6), positions=nn.Embedding(9, 6), head=nn.Linear(6, 11)
    )  # fmt: skip
    case = Case(model, token_ids(*sizes, length=4), next_token)
    case.roads = {"positions.weight": MEETS_DATA}
    return case


def masked_next_token(model, batch):
    """Mean over the labels that are not -100, as for a causal language model."""
    tokens, labels = batch
    losses = F.cross_entropy(
        model(tokens).transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


def positions_with_an_empty_first_sample():
    """T == B, and the first sample, whose labels are all masked, has no gradient to look at."""
    case = positions((4, 3))
    labels = [tokens.roll(-1, 1) for tokens in case.batches]
    labels[0][0] = -100
    case.batches = list(zip(case.batches, labels, strict=True))
    case.loss_fn = masked_next_token
    return case


def positions_with_a_short_first_sample():
    """T == B, and the loss that stands out has a label at position 0 only, which sees no other."""

    def loss_fn(model, batch):
        short = (batch[1] != -100).sum(1) == 1
        return masked_next_token(model, batch) * torch.where(short, 100, 1)

    case = positions_with_an_empty_first_sample()
    tokens, labels = case.batches[0]
    labels[0, 0] = tokens[0, 1]
    case.loss_fn = loss_fn
    return case


def positions_by_sample():
    """Positions [B, T] that differ from sample to sample, as for padding on the left."""

    def run(self, tokens, places):
        return self.head(mix(self.tokens(tokens) + self.positions(places)))

    model = Calls(
        run, tokens=nn.Embedding(11, 6), positions=nn.Embedding(9, 6), head=nn.Linear(6, 11)
    )  # fmt: skip

    def loss_fn(model, batch):
        return next_token(lambda tokens: model(tokens, batch[1]), batch[0])

    batches = [(tokens, torch.randint(0, 9, tokens.shape)) for tokens in token_ids(3, 2, length=4)]
    return Case(model, batches, loss_fn)


def positions_expanded():
    """Ids [1, T] that are expanded to [B, T] before they are looked up: rows of their own."""

    def run(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return self.head(mix(self.tokens(tokens) + self.positions(places)))

    model = Calls(
        run, tokens=nn.Embedding(11, 6), positions=nn.Embedding(9, 6), head=nn.Linear(6, 11)
    )  # fmt: skip
    return Case(model, token_ids(3, 2, length=4), next_token)


def tables():
    """Parameters as tables, sliced and added in every way that vision models know."""

    def run(self, x):
        length = x.shape[1]
        x = self.body(x) + self.whole
        x = x + self.sliced[:, :length] + self.flat[:length]
        x = mix(x) + self.longer[2 : length + 2].unsqueeze(0)
        x = x + torch.index_select(self.chosen, 0, torch.arange(length, device=x.device).flip(0))
        return self.head(mix(x + self.rows[:, None] + self.columns[None]))

    shapes = {
        "whole": (1, 4, 6), "sliced": (1, 9, 6), "flat": (9, 6), "longer": (9, 6), "chosen": (9, 6),
        "rows": (4, 6), "columns": (4, 6),
    }  # fmt: skip
    weights = {name: parameter(*shape) for name, shape in shapes.items()}
    weights["rows"], weights["columns"] = parameter(4), parameter(6)
    model = Calls(run, body=nn.Linear(8, 6), head=nn.Linear(6, 3), **weights)
    roads = {f"{name}*": "batched" for name in ("body", "head")} | {"*": MEETS_DATA}
    return Case(model, sequences(4, 3, length=4), per_sample, roads=roads)


def resized_table():
    """A grid of positions that is interpolated to the image's size, as in DINOv2."""

    def run(self, x):
        grid = F.interpolate(
            self.grid.view(1, 3, 3, 6).permute(0, 3, 1, 2), size=(2, 2), mode="bicubic"
        )
        return self.head(mix(self.body(x) + grid.flatten(2).transpose(1, 2)))

    model = Calls(run, body=nn.Linear(8, 6), head=nn.Linear(6, 3), grid=parameter(1, 9, 6))
    return Case(model, sequences(4, 3, length=4), per_sample, roads={"grid": MEETS_DATA})


def class_tokens(way):
    """A class token, a distillation token and a table over both, as in ViT and DeiT."""

    def run(self, x):
        x = self.body(x)
        if way == "expand":
            parts = [self.first.expand(len(x), -1, -1), self.second.expand(len(x), 1, 6)]
        elif way == "repeat":
            parts = [self.first.repeat(len(x), 1, 1), self.second.repeat_interleave(len(x), 0)]
        else:
            ones = x.new_zeros(len(x), 1, 6)
            parts = [self.first + ones, torch.broadcast_to(self.second, ones.shape)]
        x = torch.cat([*parts, x], 1) + self.table
        return self.head(mix(x.flip(1))[:, -2:])

    model = Calls(
        run, body=nn.Linear(8, 6), head=nn.Linear(6, 3), first=parameter(1, 1, 6),
        second=parameter(1, 1, 6), table=parameter(1, 7, 6),
    )  # fmt: skip
    roads = dict.fromkeys(("first", "second", "table"), MEETS_DATA)
    return Case(model, sequences(4, 3, 1), per_sample, roads=roads)


def masked_tokens():
    """A mask token stands in for some patches, as in MAE and wav2vec: by where, and by index."""

    def run(self, x):
        masked = x[..., :1] > 0.5
        x = torch.where(masked, self.mask, self.body(x))
        x = x * ~masked + self.other * masked
        chosen = mix(x).masked_fill(masked, 0.0)
        return self.head(chosen + mix(x))

    model = Calls(
        run, body=nn.Linear(8, 6), head=nn.Linear(6, 3), mask=parameter(1, 1, 6), other=parameter(6)
    )  # fmt: skip
    roads = {"mask": MEETS_DATA, "other": MEETS_DATA}
    return Case(model, sequences(4, 3), per_sample, roads=roads)


def written_by_index():
    """A token that is written into a tensor in place, at places that differ by sample."""

    def run(self, x):
        x = self.body(x).clone()
        x[x[..., 0] > 0] = self.mask
        return self.head(mix(x))

    model = Calls(run, body=nn.Linear(8, 6), head=nn.Linear(6, 3), mask=parameter(6))
    return Case(model, sequences(4, 3), per_sample, {"mask"})


def relative_positions(way):
    """A bias of attention looked up by distance: T5's embedding, Swin's table by index."""

    def run(self, x):
        q, k, v = (self.heads(x, name) for name in "qkv")
        places = torch.arange(x.shape[1], device=x.device)
        distance = places[None] - places[:, None] + x.shape[1] - 1
        if way == "embedding":
            bias = self.table(distance).permute(2, 0, 1).unsqueeze(0)
        else:
            bias = self.table.weight[distance.view(-1)].view(len(places), len(places), 2)
            bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if way == "mask":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            out = (q @ k.transpose(-1, -2) / 2 + bias).softmax(-1) @ v
        return self.out(out.transpose(1, 2).flatten(2))

    class Attention(Calls):
        def heads(self, x, name):
            return getattr(self, name)(x).unflatten(-1, (2, 4)).transpose(1, 2)

    layers = {name: nn.Linear(8, 8, bias=name != "k") for name in ("q", "k", "v", "out")}
    model = Attention(run, table=nn.Embedding(9, 2), **layers)
    return Case(model, sequences(4, 3), per_sample, roads={"table*": MEETS_DATA})


def queries_without_a_batch():
    """Learned queries go through a layer once, before they are expanded to the batch."""

    def run(self, x):
        keys = self.key(x)
        queries = self.query(self.queries).expand(len(x), -1, -1)
        return (queries @ keys.transpose(1, 2)).softmax(-1) @ keys

    model = Calls(
        run, queries=parameter(1, 3, 8), query=nn.Linear(8, 8), key=nn.Linear(8, 8)
    )  # fmt: skip
    roads = {"queries": MEETS_DATA, "query.*": MEETS_DATA}
    return Case(model, sequences(3, 2, 1), per_sample, roads=roads)


def learned_in_fused_attention(what, length=5):
    """Learned queries, or values of width 1, go into torch's own attention as they are."""

    def run(self, x):
        keys = self.key(x)
        if what == "queries":
            queries, values = self.learned.expand(len(x), -1, -1), torch.tanh(self.other(x))
        else:
            queries, values = self.other(x), self.learned
        return F.scaled_dot_product_attention(queries, keys, values)

    learned = parameter(1, 3, 8) if what == "queries" else parameter(1, length, 1)
    model = Calls(
        run, learned=learned, key=nn.Linear(8, 8, bias=False), other=nn.Linear(8, 8)
    )  # fmt: skip
    roads = {"learned": MEETS_DATA} if what == "queries" else {}
    fallback = {"learned"} if what == "values" else set()
    return Case(model, sequences(4, 3, length=length), per_sample, fallback, roads)


def pooling_by_a_query():
    """A query [D] that every token is compared with: a product with a vector of parameters."""

    def run(self, x):
        weights = torch.softmax(torch.tanh(self.body(x)) @ self.query, 1)
        return self.head((weights.unsqueeze(-1) * x).sum(1))

    model = Calls(run, body=nn.Linear(8, 6), head=nn.Linear(8, 3), query=parameter(6))
    return Case(model, sequences(4, 3), per_sample, {"query"})


POSITIONS: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        positions_with_an_empty_first_sample, positions_with_a_short_first_sample,
        positions_by_sample, positions_expanded, tables, resized_table, masked_tokens,
        queries_without_a_batch, pooling_by_a_query,
    )
}  # fmt: skip
POSITIONS |= {
    "positions": functools.partial(positions, (3, 2)),
    "positions_T_equals_B": functools.partial(positions, (4, 3)),
    "positions_of_one_row": functools.partial(positions, (3, 1), broadcast=True),
    "positions_of_one_row_after_a_batch_of_one": functools.partial(
        positions, (1, 3, 4), broadcast=True
    ),
    "positions_after_a_batch_of_one": functools.partial(positions, (1, 4, 3)),
}
POSITIONS |= {
    f"learned_{what}_over_{n}_keys": functools.partial(learned_in_fused_attention, what, n)
    for what, n in (("queries", 5), ("queries", 8), ("queries", 1), ("values", 5))
}
POSITIONS |= {
    f"class_tokens_{way}": functools.partial(class_tokens, way)
    for way in ("expand", "repeat", "add")
}
POSITIONS |= {
    f"relative_positions_by_{way}": functools.partial(relative_positions, way)
    for way in ("embedding", "index", "mask")
}
