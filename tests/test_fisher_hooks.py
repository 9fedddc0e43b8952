"""Hooks on activations and custom functions: gradients that a model's own backward changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import assert_as_exact_as_a_loop, score, truth
from models import Calls, Case, classify
from models.case import vectors
from torch import nn

import fishfast as ff

# ---- a hook that solves for its gradient --------------------------------------------------------


class Equilibrium(nn.Module):
    """``z = tanh(W z + U x)``; the gradient through the fixed point is one, too."""

    def __init__(self, graph, one_time=False, solver=torch.autograd.grad):
        super().__init__()
        self.w, self.u, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        nn.init.uniform_(self.w.weight, -0.15, 0.15)
        self.graph, self.one_time, self.solver = graph, one_time, solver

    def cell(self, z, x):
        return torch.tanh(self.w(z) + self.u(x))

    def forward(self, x):
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(60):
                z = self.cell(z, x)
        start = z.requires_grad_()
        out = self.cell(start, x)
        inner = out
        if self.graph == "second":
            start = z.detach().requires_grad_()
            inner = self.cell(start, x)
        busy = []

        def solve(grad):
            if self.one_time:
                handle.remove()
            if busy:
                return None
            busy.append(1)
            result = grad
            for _ in range(60):
                (part,) = torch.autograd.grad(inner, start, result, retain_graph=True)
                result = part + grad
            busy.clear()
            return result

        handle = out.register_hook(solve)
        return self.head(out)


@pytest.mark.parametrize("sizes", [(5, 3), (1, 4), (1, 1)], ids=["many", "one-first", "ones"])
@pytest.mark.parametrize("one_time", [False, True], ids=["stays", "removes-itself"])
@pytest.mark.parametrize("graph", ["own", "second"])
def test_a_hook_that_takes_gradients_of_its_own(graph, one_time, sizes):
    """Deep equilibrium models: only the outer backward's gradients are scores."""
    case = Case(Equilibrium(graph, one_time), vectors(*sizes), classify)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32), rounding=1e-5)
    assert not fisher.fallback


class Rebuilds(Equilibrium):
    """Its hook makes a graph of its own, with gradients on, and asks for those of a weight too."""

    def forward(self, x):
        out = self.cell(torch.zeros_like(x), x)

        def hook(grad):
            with torch.enable_grad():
                z = torch.zeros_like(x).requires_grad_()
                again = self.cell(z, x)
            inputs = [z, self.w.weight] if self.graph == "weight" else [z]
            (first, *_) = torch.autograd.grad(again, inputs, grad)
            return grad + first

        out.register_hook(hook)
        return self.head(out)


@pytest.mark.parametrize("graph", ["input", "weight"])
def test_a_hook_that_runs_a_layer_again(graph):
    case = Case(Rebuilds(graph), vectors(5, 3), classify)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    if graph == "weight":  # which no cut graph has: autograd takes them all
        assert set(fisher.roads.values()) == {
            "one sample at a time: loss_fn takes gradients itself"
        }


class RunsAgain(torch.autograd.Function):
    """A checkpoint under another name: its layer's gradients come to be in its backward."""

    @staticmethod
    def forward(ctx, layer, x):
        ctx.layer, ctx.x = layer, x.detach()
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.x.clone().requires_grad_()
            ctx.layer(x).backward(grad)
        return None, x.grad


def test_a_layer_that_a_backward_runs_again_is_refused():
    model = Calls(
        lambda self, x: self.head(RunsAgain.apply(self.inner, self.first(x))),
        first=nn.Linear(6, 6), inner=nn.Linear(6, 6), head=nn.Linear(6, 4),
    )  # fmt: skip
    with pytest.raises(ValueError, match="layers must not run again inside the backward"):
        ff.estimate_fisher(model, vectors(4), loss_fn=classify)


@pytest.mark.parametrize("kept", [None, 1.0], ids=["no-grad", "grad"])
def test_a_layer_of_the_fallback_that_a_backward_runs_again_is_refused(kept):
    """All is left to autograd, whose inner backward adds to the weights' own ``grad``."""

    def loss_fn(model, batch):
        x = batch[0].clone().requires_grad_()
        out = model.head(RunsAgain.apply(model.inner, model.first(x)))
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1], reduction="none") + 0 * grad.detach().sum(1)

    model = Calls(None, first=nn.Linear(6, 6), inner=nn.Linear(6, 6), head=nn.Linear(6, 4))
    if kept is not None:
        model.inner.weight.grad = torch.full((6, 6), kept)
    grad = model.inner.weight.grad
    with pytest.raises(ValueError, match="layers must not run again inside the backward"):
        ff.estimate_fisher(model, vectors(4), loss_fn=loss_fn)
    assert model.inner.weight.grad is grad


# ---- gradients that depend on the batch's other samples -----------------------------------------


def to_length(grad):
    return grad * (0.05 / grad.norm())


def clipped(limit):
    return lambda grad: grad * (limit / (grad.norm() + 1e-8)).clamp(max=1)


def clipped_values(grad):
    return grad.clamp(-0.02, 0.02)


def signs(grad):
    return grad.sign()


def row_by_row(grad):
    return grad / (grad.norm(dim=-1, keepdim=True) + 1e-3)


def halved(grad):
    return grad / 2


class Backwards(torch.autograd.Function):
    """The identity, with a backward of its own."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def by_hook(x, change):
    x.register_hook(change)
    return x


def by_node(x, change):
    x.grad_fn.register_prehook(lambda grads: (change(grads[0]),))
    return x


def by_module_hook(x, change):
    module = nn.Identity()
    module.register_full_backward_hook(lambda module, grads, _: (change(grads[0]),))
    return module(x.clone())


WAYS = {
    "tensor": by_hook, "function": Backwards.apply, "module": by_module_hook, "node": by_node
}  # fmt: skip
CHANGES = {
    "length": to_length, "always-clipped": clipped(0.01), "seldom-clipped": clipped(0.4),
    "never-clipped": clipped(1e3), "values": clipped_values, "signs": signs, "rows": row_by_row,
    "halved": halved,
}  # fmt: skip


def changed(way, change):
    def run(self, x):
        hidden = WAYS[way](torch.tanh(self.first(x)), CHANGES[change])
        return self.head(torch.tanh(self.second(hidden)))

    return Calls(run, first=nn.Linear(6, 8), second=nn.Linear(8, 8), head=nn.Linear(8, 4))


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("way", ["tensor", "function", "module"])
def test_gradients_that_python_changes(way, change):
    """Sixteen samples and more, too: signs look like the gradients of sample 8."""
    case = Case(changed(way, change), vectors(5, 20, 2, 1), classify)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    if change in {"never-clipped", "halved"}:
        assert not fisher.fallback
    assert fisher.roads["head.weight"] == "batched"


@pytest.mark.parametrize("change", ["length", "always-clipped", "halved"])
def test_gradients_that_a_hook_on_a_node_changes(change):
    case = Case(changed("node", change), vectors(5, 4), classify)
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


def test_a_gradient_that_is_clipped_in_a_later_batch_only():
    batches = [(*vectors(4)[0], torch.full((4,), factor)) for factor in (0.01, 0.02, 50.0, 0.01)]

    def loss_fn(model, batch):
        return classify(model, batch[:2]) * batch[2]

    case = Case(changed("tensor", "seldom-clipped"), batches, loss_fn)
    assert not score(Case(case.model, batches[:2], loss_fn)).fallback
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert "first.weight" in fisher.fallback


@pytest.mark.parametrize("options", [{"fisher_type": "exact"}, {"power": 1, "loss_fn": classify}])
def test_gradients_that_python_changes_in_other_scores(options):
    model, batches = changed("tensor", "length"), vectors(5, 4)
    if "loss_fn" not in options:
        options = {**options, "outputs_fn": lambda model, batch: model(batch[0])}
    together = ff.estimate_fisher(model, batches, **options)
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    alone = ff.estimate_fisher(model, singles, **options)
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-9)


def test_tied_weights_on_both_sides_of_a_hook():
    """The head's gradient is batched and the table's is not: their sum is, neither twice."""

    def run(self, tokens):
        hidden = self.table(tokens).mean(1)
        hidden = by_hook(torch.tanh(self.linear(hidden)), to_length)
        return hidden @ self.table.weight.T

    model = Calls(run, table=nn.Embedding(7, 6), linear=nn.Linear(6, 6))
    batches = [(torch.randint(0, 7, (b, 3)), torch.randint(0, 7, (b,))) for b in (4, 3)]
    case = Case(model, batches, classify)
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


class Once(nn.Module):
    """A hook that changes the first gradient it sees, and no other one."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        seen = []

        def hook(grad):
            seen.append(1)
            return grad * 3 if len(seen) == 1 else grad

        hidden = torch.tanh(self.linear(x))
        hidden.register_hook(hook)
        return self.head(hidden)


@pytest.mark.parametrize("size", [4, 1])
def test_a_hook_that_counts_is_refused(size):
    with pytest.raises(ValueError, match="must be the same when a backward runs again"):
        ff.estimate_fisher(Once(), vectors(size), loss_fn=classify)


def test_hooks_do_not_outlive_the_scoring():
    """The graph that they were on is gone, and a later backward runs them as torch does."""
    case = Case(changed("tensor", "halved"), vectors(3), classify)
    score(case)
    out = case.model(case.batches[0][0]).requires_grad_()
    calls = []
    handle = out.register_hook(lambda grad: calls.append(1))
    F.cross_entropy(out, case.batches[0][1]).backward(retain_graph=True)
    handle.remove()
    F.cross_entropy(out, case.batches[0][1]).backward()
    assert calls == [1]
