"""Rows that lie as samples would in one batch, and otherwise in the next one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import assert_as_exact_as_a_loop, score, truth
from models import Calls, Case, classify, parameter
from models.case import vectors
from torch import nn

# ---- learned prototypes, as many as samples -----------------------------------------------------

PROTOTYPES = {
    "cdist": lambda h, p: torch.cdist(h, p),
    "einsum": lambda h, p: torch.einsum("bd,kd->bk", h, p),
    "matmul": lambda h, p: h @ p.T,
    "linear": F.linear,
    "differences": lambda h, p: (h[:, None] - p[None]).square().sum(-1),
    "cosine": lambda h, p: F.cosine_similarity(h[:, None], p[None], dim=-1),
    "unit-length": lambda h, p: F.normalize(h, dim=1) @ F.normalize(p, dim=1).T,
    "bmm": lambda h, p: torch.bmm(h[None], p.T[None])[0],
    "addmm": lambda h, p: torch.addmm(torch.zeros(len(p), dtype=h.dtype), h, p.T),
    "prototypes-first": lambda h, p: (p @ h.T).T,
}
# What the prototypes are: a parameter, or what a layer makes of a parameter or of a constant.
MADE = {
    "parameter": lambda model: model.prototypes,
    "layer-of-a-parameter": lambda model: model.made(model.prototypes),
    "layer-of-a-buffer": lambda model: model.made(model.codes) + 0 * model.prototypes.sum(),
    "normed": lambda model: F.layer_norm(model.prototypes, (4,), model.scale),
}


def own_distance(model, batch):
    x, y = batch
    return model(x).gather(1, y[:, None]).squeeze(1).square()


def with_prototypes(kind, made, classes):
    return Calls(
        lambda self, x: PROTOTYPES[kind](torch.tanh(self.encoder(x)), MADE[made](self)),
        encoder=nn.Linear(4, 4), made=nn.Linear(4, 4), prototypes=parameter(classes, 4),
        codes=torch.randn(classes, 4), scale=parameter(4),
    )  # fmt: skip


LABELS = [
    pytest.param(3, [[0, 1, 2], [1, 1, 1]], id="in-order-first"),
    pytest.param(3, [[0, 1, 2], [2, 0, 1], [0, 1, 2], [0, 0, 2]], id="in-order-again"),
    pytest.param(3, [[2, 0, 1], [2, 0, 1], [0, 1, 2]], id="in-another-order"),
    pytest.param(2, [[0, 1], [1, 0], [1, 1], [0, 1], [0, 0]], id="two"),
    pytest.param(4, [[0, 1], [0, 1, 2, 3], [3, 2, 1, 0], [3]], id="of-other-sizes"),
]


@pytest.mark.parametrize(("classes", "labels"), LABELS)
@pytest.mark.parametrize("kind", list(PROTOTYPES))
def test_prototypes_are_not_taken_for_samples(kind, classes, labels):
    batches = [(torch.randn(len(y), 4), torch.tensor(y)) for y in labels]
    case = Case(with_prototypes(kind, "parameter", classes), batches, own_distance)
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


@pytest.mark.parametrize(("classes", "labels"), LABELS)
@pytest.mark.parametrize("made", list(MADE))
@pytest.mark.parametrize("kind", ["cdist", "matmul", "differences"])
def test_prototypes_that_are_computed(kind, made, classes, labels):
    batches = [(torch.randn(len(y), 4), torch.tensor(y)) for y in labels]
    case = Case(with_prototypes(kind, made, classes), batches, own_distance)
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


def test_prototypes_that_are_picked_by_an_index():
    """VQ: the nearest code, straight-through; each sample's own code has its gradient."""

    def run(self, x):
        h = self.encoder(x)
        codes = self.made(self.codes)
        nearest = torch.cdist(h, codes).argmin(1)
        quantized = h + (codes[nearest] - h).detach()
        return self.head(quantized) + (codes[nearest] - h).square().sum(1, keepdim=True)

    model = Calls(
        run, encoder=nn.Linear(4, 4), made=nn.Linear(4, 4), codes=parameter(3, 4),
        head=nn.Linear(4, 3),
    )  # fmt: skip
    batches = [(torch.randn(3, 4), torch.tensor([0, 1, 2])) for _ in range(4)]
    case = Case(model, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


def test_a_batch_against_itself_by_its_labels():
    """Each query's document is another sample's row: what is in order first is not later."""

    def loss_fn(model, batch):
        queries, documents, own = batch
        scores = torch.cdist(model.query(queries), model.document(documents))
        return scores.gather(1, own[:, None]).squeeze(1)

    model = Calls(None, query=nn.Linear(4, 5), document=nn.Linear(4, 5))
    batches = [
        (torch.randn(n, 4), torch.randn(n, 4), torch.tensor(own))
        for n, own in ((3, [0, 1, 2]), (2, [0, 1]), (3, [1, 2, 0]), (2, [1, 0]))
    ]  # fmt: skip

    def take(batch, b):
        if b >= len(batch[2]):
            return None
        own = int(batch[2][b])
        return batch[0][b : b + 1], batch[1][own : own + 1], torch.zeros(1, dtype=torch.int64)

    case = Case(model, batches, loss_fn, take=take)
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


# ---- samples that Python puts in another order --------------------------------------------------


def by_list(h, order):
    rows = list(h)
    return torch.stack([rows[i] for i in order])


def by_split(h, order):
    rows = h.split(1)
    return torch.cat([rows[i] for i in order])


def by_unbind(h, order):
    rows = h.unbind()
    return torch.stack([rows[i] for i in order])


def by_chunk(h, order):
    rows = h.chunk(len(h))
    return torch.cat([rows[i] for i in order])


def by_select(h, order):
    return torch.stack([h[i] for i in order])


def by_slices(h, order):
    return torch.cat([h[i : i + 1] for i in order])


def by_narrow(h, order):
    return torch.cat([h.narrow(0, i, 1) for i in order])


def by_sizes(h, order):
    rows = h.split([1] * len(h))
    return torch.cat([rows[i] for i in order])


def by_index(h, order):
    return h[torch.tensor(order)]


def by_dim_1(h, order):
    rows = h.T.unbind(1)
    return torch.stack([rows[i] for i in order], 1).T


def by_writes(h, order):
    out = torch.zeros_like(h)
    for place, i in enumerate(order):
        out[place] = h[i]
    return out


MOVES = [
    by_list, by_split, by_unbind, by_chunk, by_select, by_slices, by_narrow, by_sizes, by_index,
    by_dim_1, by_writes,
]  # fmt: skip


def back(order):
    return sorted(range(len(order)), key=order.__getitem__)


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
@pytest.mark.parametrize("size", [4, 2])
def test_samples_in_an_order_that_python_makes(move, size):
    """The same layer before and between: its two uses of a sample are summed before the square."""

    def run(self, x, order):
        order = order.tolist() if len(x) > 1 else [0]
        hidden = move(torch.tanh(self.layer(x)), order)
        return self.head(move(torch.tanh(self.layer(hidden)), back(order)))

    model = Calls(run, layer=nn.Linear(6, 6), head=nn.Linear(6, 3))
    orders = [[0, 1, 2, 3], [2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0]]
    orders = [[i for i in order if i < size] for order in orders]
    batches = [
        (torch.randn(size, 6), torch.tensor(order), torch.randint(0, 3, (size,)))
        for order in orders
    ]  # fmt: skip

    def loss_fn(model, batch):
        return F.cross_entropy(model(*batch[:2]), batch[2], reduction="none")

    case = Case(model, batches, loss_fn)
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


def test_a_list_of_samples_in_their_order():
    """Taken apart and put together again as they were: the graph says whose each one is."""

    def run(self, x):
        hidden = torch.tanh(self.layer(x))
        return torch.stack([self.head(h[None])[0] for h in hidden.unbind()])

    model = Calls(run, layer=nn.Linear(6, 6), head=nn.Linear(6, 4))
    case = Case(model, vectors(3, 3, 3), classify)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert fisher.roads["layer.weight"] == "batched"


def test_dims_that_python_turns_by_the_data():
    """[B, T] or [T, B] with T == B: the same operations along other dims."""

    def run(self, x, turned):
        dim = int(turned[0])
        hidden = torch.tanh(self.layer(torch.tanh(self.first(x)).transpose(0, dim)))
        return hidden.transpose(0, dim)

    model = Calls(run, first=nn.Linear(4, 4), layer=nn.Linear(4, 5))
    batches = [(torch.randn(3, 3, 4), torch.full((3,), t)) for t in (0, 1, 0, 1, 1)]
    case = Case(model, batches, lambda model, batch: model(*batch).square().sum((1, 2)))
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


def test_sums_over_dims_that_the_data_choose():
    """Nothing but the dim of the sum tells whether [T, B] or [B, T] went in."""

    def run(self, x, turned):
        dim = int(turned[0])
        hidden = torch.tanh(self.layer(torch.tanh(self.first(x)).transpose(0, dim)))
        return hidden.square().sum(1 - dim).sum(1)

    model = Calls(run, first=nn.Linear(4, 4), layer=nn.Linear(4, 5))
    batches = [(torch.randn(3, 3, 4), torch.full((3,), t)) for t in (0, 0, 1, 0, 1)]
    case = Case(model, batches, lambda model, batch: model(*batch))
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


def test_samples_in_the_last_dim_that_python_moves():
    def turned(hidden, order):
        return torch.stack([hidden.select(2, i) for i in order], 2)

    def run(self, x, order):
        order = order.tolist() if len(x) > 1 else [0]
        hidden = turned(torch.tanh(self.layer(x)).permute(1, 2, 0), order)
        hidden = torch.tanh(self.layer(hidden.permute(2, 0, 1))).permute(1, 2, 0)
        return turned(hidden, back(order)).permute(2, 0, 1).square().sum((1, 2))

    model = Calls(run, layer=nn.Linear(4, 4))
    orders = ([0, 1, 2], [0, 1, 2], [2, 0, 1], [1, 0, 2])
    batches = [(torch.randn(3, 2, 4), torch.tensor(order)) for order in orders]
    case = Case(model, batches, lambda model, batch: model(*batch))
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))
