"""Calls that have a rule, but whose rows are not the samples: the fallback must find them too."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, classify, next_token, per_sample, sequences, token_ids, vectors


def flattened_tokens():
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner, self.head = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            flat = torch.tanh(self.inner(self.norm(x).flatten(0, 1)))
            return self.head(flat.unflatten(0, x.shape[:2]))

    return Case(Flattened(), sequences(3, 2), per_sample, {"inner.weight", "inner.bias"})


def time_first():
    """Tokens [T, B]: dim 0 is never the sample but in the head."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.gru, self.head = nn.Embedding(11, 6), nn.GRU(6, 5), nn.Linear(5, 4)

        def forward(self, tokens):
            return self.head(self.gru(self.embedding(tokens))[0][-1])

    def take(batch, b):
        tokens, labels = batch
        return (tokens[:, b : b + 1], labels[b : b + 1]) if b < len(labels) else None

    model = TimeFirst()
    # T == B in the first batch, by accident.
    batches = [(torch.randint(0, 11, (4, b)), torch.randint(0, 4, (b,))) for b in (4, 3, 5)]
    names = {name for name, _ in model.named_parameters() if not name.startswith("head")}
    return Case(model, batches, classify, names, take)


class Positions(nn.Module):
    """A table of positions, looked up by arange: its call has T rows, or 1, but never B."""

    def __init__(self, broadcast):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(9, 6)
        self.head = nn.Linear(6, 11)
        self.broadcast = broadcast

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1])
        if self.broadcast:
            places = places.unsqueeze(0)
        x = self.tokens(tokens) + self.positions(places)
        # Causal: position t sees the mean of what came before it.
        seen = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(1)
        return self.head(torch.tanh(seen))


def positions(sizes, broadcast=False):
    return Case(Positions(broadcast), token_ids(*sizes, length=4), next_token, {"positions.weight"})


def masked_next_token(model, batch):
    """Mean over the labels that are not -100, as for a causal language model."""
    tokens, labels = batch
    losses = F.cross_entropy(
        model(tokens).transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


def positions_with_an_empty_first_sample():
    """T == B, and the first sample, whose labels are all masked, has no gradient to look at."""
    tokens = token_ids(4, 3, length=4)
    labels = [t.roll(-1, 1) for t in tokens]
    labels[0][0] = -100
    batches = list(zip(tokens, labels, strict=True))
    return Case(Positions(False), batches, masked_next_token, {"positions.weight"})


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


def queries_without_a_batch():
    """Learned queries go through a layer once, before they are expanded to the batch."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, 3, 8))
            self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            keys = self.key(x)
            queries = self.query(self.queries).expand(len(x), -1, -1)
            return (queries @ keys.transpose(1, 2)).softmax(-1) @ keys

    names = {"queries", "query.weight", "query.bias"}
    return Case(Queries(), sequences(3, 2, 1), per_sample, names)


def samples_in_another_order():
    """A layer that sees the samples in another order than the losses."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.turned, self.head = (nn.Linear(6, n) for n in (6, 6, 4))

        def forward(self, x):
            return self.head(self.turned(torch.tanh(self.first(x)).flip(0)).flip(0))

    return Case(Turned(), vectors(4, 3), classify, {"turned.weight", "turned.bias"})


def routed_samples():
    """Experts that see some of the samples only, and now and then all of them."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            out = torch.zeros_like(x)
            for expert, mine in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
                out = out.index_put((mine,), expert(x[mine]))
            return self.head(out)

    case = Case(Routed(), vectors(3, 5, 4), classify, set())
    case.batches[0][0][:, 0].abs_()
    case.fallback = {name for name, _ in case.model.named_parameters() if "experts" in name}
    return case


UNRULED_ROWS: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        flattened_tokens, time_first, queries_without_a_batch, samples_in_another_order,
        routed_samples, positions_with_an_empty_first_sample, positions_with_a_short_first_sample,
    )
}  # fmt: skip
UNRULED_ROWS |= {
    "positions": functools.partial(positions, (3, 2)),
    "positions_T_equals_B": functools.partial(positions, (4, 3)),
    "positions_of_one_row": functools.partial(positions, (3, 1), broadcast=True),
    "positions_after_a_batch_of_one": functools.partial(positions, (1, 4, 3)),
}
