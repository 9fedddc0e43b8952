"""What a forward changes: hidden states, counters, batches that it rewrites, and random numbers."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fishfast as ff

BATCHES = [
    torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(3)
]


def loop(model, batches, loss_fn):
    """One forward for each batch, in float64, and one backward for each loss."""
    model = copy.deepcopy(model).double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        for loss in loss_fn(model, batch):
            grads = torch.autograd.grad(
                loss, list(model.parameters()), retain_graph=True, allow_unused=True
            )
            for values, grad in zip(total.values(), grads, strict=True):
                values += 0 if grad is None else grad.square()
    return total


def assert_like_the_loop(fisher, expected):
    for name, values in expected.items():
        torch.testing.assert_close(
            fisher[name].double(), values, rtol=1e-5, atol=1e-6 * float(values.max())
        )


# ---- state of the model and of loss_fn ----------------------------------------------------------


class Language(nn.Module):
    """A GRU, which no rule covers, between layers that are batched."""

    def __init__(self):
        super().__init__()
        self.table, self.cell = nn.Embedding(9, 8), nn.GRU(8, 8, batch_first=True)
        self.head, self.hidden = nn.Linear(8, 9), None

    def forward(self, tokens, hidden):
        out, hidden = self.cell(self.table(tokens), hidden)
        return self.head(out), hidden


def losses_of(logits, tokens):
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


class Carried:
    """A loss_fn that keeps the hidden state, as word-level language models do."""

    def __init__(self):
        self.hidden, self.calls = None, 0

    def __call__(self, model, tokens):
        self.calls += 1
        logits, hidden = model(tokens[:, :-1], self.hidden)
        self.hidden = hidden.detach()
        return losses_of(logits, tokens)


def carried_by_the_model(model, tokens):
    logits, hidden = model(tokens[:, :-1], model.hidden)
    model.hidden = hidden.detach()
    return losses_of(logits, tokens)


def test_a_hidden_state_that_loss_fn_carries():
    loss_fn = Carried()
    fisher = ff.estimate_fisher(Language(), BATCHES, loss_fn=loss_fn)
    assert loss_fn.calls == fisher.passes["forward"] == len(BATCHES)
    model = Language()
    fisher = ff.estimate_fisher(model, BATCHES, loss_fn=Carried())
    assert_like_the_loop(fisher, loop(model, BATCHES, Carried()))


def test_a_hidden_state_that_the_model_carries():
    model = Language()
    expected = loop(model, BATCHES, carried_by_the_model)
    assert_like_the_loop(ff.estimate_fisher(model, BATCHES, loss_fn=carried_by_the_model), expected)


class Warms(nn.Module):
    """A factor that grows from call to call, and a weight beside it that no rule covers."""

    def __init__(self):
        super().__init__()
        self.linear, self.slope, self.calls = nn.Linear(6, 4), nn.PReLU(), 0

    def forward(self, x):
        self.calls += 1
        return self.calls * self.slope(self.linear(x))


def test_a_counter_of_the_model():
    model, batches = Warms(), [torch.randn(3, 6) for _ in range(3)]

    def loss_fn(model, x):
        return model(x.to(model.linear.weight.dtype)).square().sum(1)

    expected = loop(model, batches, loss_fn)
    assert_like_the_loop(ff.estimate_fisher(model, batches, loss_fn=loss_fn), expected)


class LookedUp(nn.Module):
    """A table that is looked up once for all samples: a second forward catches it further on."""

    def __init__(self, state):
        super().__init__()
        self.linear, self.table, self.state = nn.Linear(6, 4), nn.Embedding(6, 1), state

    def forward(self, x):
        return self.linear(x + self.table(torch.arange(6)).T) * self.state()


class Counts:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls


def keeps():
    kept = []

    def state():
        kept.append(1.0)
        return sum(kept)

    return state


@pytest.mark.parametrize("make", [Counts, keeps], ids=["object", "closure"])
def test_a_second_forward_with_other_losses_is_refused(make):
    text = r"the same losses when it runs again .*; got \S+, then \S+ for sample \d; .*hidden state"
    with pytest.raises(ValueError, match=text):
        ff.estimate_fisher(
            LookedUp(make()), [torch.randn(3, 6)], loss_fn=lambda m, x: m(x).square().sum(1)
        )


def test_losses_that_take_gradients_and_change_are_refused():
    """The first forward breaks off, so that the second and the third are compared."""
    model, calls = nn.Linear(6, 4), []

    def loss_fn(model, x):
        calls.append(1)
        x = x.clone().requires_grad_()
        out = model(x).square().sum(1)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out + len(calls) * grad.square().sum(1)

    with pytest.raises(ValueError, match="it takes gradients itself.*got .* for sample"):
        ff.estimate_fisher(model, [torch.randn(3, 6)], loss_fn=loss_fn)


def test_noise_is_the_same_when_a_forward_runs_again():
    model = LookedUp(lambda: 1 + torch.rand(1))
    loss_fn = lambda model, x: model(x).square().sum(1)  # noqa: E731
    batches = [torch.randn(3, 6) for _ in range(2)]
    fisher = ff.estimate_fisher(model, batches, loss_fn=loss_fn)
    assert fisher.passes["forward"] == len(batches) + 1
    assert_like_the_loop(fisher, loop(model, batches, with_the_noise_of_scoring(loss_fn)))


def with_the_noise_of_scoring(loss_fn):
    """Scoring draws from a state of its own, which begins as the caller's and goes on."""
    return lambda model, x: loss_fn(model, x.to(model.linear.weight.dtype))


# ---- batches that a forward rewrites ------------------------------------------------------------


@dataclasses.dataclass
class Graph:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Nested:
    inside: Graph


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    y: torch.Tensor


class Named(NamedTuple):
    graph: Graph
    size: int


class Store(dict):
    """A dict whose entries are attributes, as libraries of graphs have them."""

    def __getattr__(self, name):
        return self[name]

    def __setattr__(self, name, value):
        self[name] = value


def bare(x, y):
    graph = type("Data", (), {})()
    graph.x, graph.y = x, y
    return graph


BOXES = {
    "dataclass": (Graph, lambda box: box),
    "slots": (Slotted, lambda box: box),
    "frozen": (lambda x, y: Nested(Graph(x, y)), lambda box: box.inside),
    "object": (bare, lambda box: box),
    "in-a-list": (lambda x, y: [Graph(x, y)], lambda box: box[0]),
    "in-a-named-tuple": (lambda x, y: Named(Graph(x, y), len(x)), lambda box: box.graph),
    "in-a-dict": (lambda x, y: {"graph": Graph(x, y)}, lambda box: box["graph"]),
    "store": (lambda x, y: Store(x=x, y=y), lambda box: box),
}  # fmt: skip


class Rewrites(nn.Module):
    """``graph.x = layer(graph.x)``, as networks of graphs do; a table needs a second forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.table = nn.Embedding(6, 1)

    def forward(self, graph):
        graph.x = torch.tanh(self.first(graph.x.to(self.first.weight.dtype)))
        graph.x = self.second(graph.x + self.table(torch.arange(6)).T)
        return graph.x


@pytest.mark.parametrize("kind", list(BOXES))
def test_a_batch_that_a_forward_rewrites(kind):
    box, content = BOXES[kind]
    made = [(torch.randn(b, 6), torch.randint(0, 4, (b,))) for b in (4, 2)]

    def loss_fn(model, batch):
        graph = content(batch)
        return F.cross_entropy(model(graph), graph.y, reduction="none")

    batches = [box(x, y) for x, y in made]
    model = Rewrites()
    fisher = ff.estimate_fisher(model, batches, loss_fn=loss_fn)
    assert fisher.passes["forward"] == 3
    for batch, (x, y) in zip(batches, made, strict=True):
        assert content(batch).x is x
        assert content(batch).y is y
    assert_like_the_loop(fisher, loop(model, [box(x, y) for x, y in made], loss_fn))


def test_a_batch_that_refers_to_itself():
    graph = bare(torch.randn(3, 6), torch.randint(0, 4, (3,)))
    graph.self, graph.model = graph, nn.Linear(1, 1)

    def loss_fn(model, graph):
        assert graph.self is graph
        return F.cross_entropy(model(graph.self), graph.y, reduction="none")

    x = graph.x
    assert ff.estimate_fisher(Rewrites(), [graph], loss_fn=loss_fn).num_samples == 3
    assert graph.x is x


class Handle:
    """Memory of another library, which must be freed once."""

    freed: list[int] = []  # noqa: RUF012

    def __init__(self):
        self.address = id(self)

    def __del__(self):
        self.freed.append(self.address)


def test_handles_and_long_chains_are_handed_on():
    graph = bare(torch.randn(3, 6), torch.randint(0, 4, (3,)))
    graph.handle, handle = Handle(), None
    link = graph.chain = bare(None, None)
    for _ in range(2000):
        link.next = bare(None, None)
        link = link.next

    def loss_fn(model, batch):
        nonlocal handle
        handle = batch.handle
        return F.cross_entropy(model(batch), batch.y, reduction="none")

    ff.estimate_fisher(Rewrites(), [graph], loss_fn=loss_fn)
    assert handle is graph.handle
    assert not Handle.freed


def test_a_batch_that_can_be_gone_through_once():
    """No call has to be caught later: one forward is enough."""
    model, samples = LookedUp(lambda: 1), [torch.randn(6), torch.randn(6)]

    def loss_fn(model, batch):
        weight = model.linear.weight
        return torch.stack([model(x.to(weight.dtype)).square().sum() for x in batch])

    fisher = ff.estimate_fisher(model, [iter(samples)], loss_fn=loss_fn)
    assert fisher.passes["forward"] == 1
    assert_like_the_loop(fisher, loop(model, [samples], loss_fn))
