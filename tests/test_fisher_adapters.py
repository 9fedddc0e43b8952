"""Weights that are computed from others, for batches of as many samples as a weight has rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import assert_as_exact_as_a_loop, score, truth
from models import Calls, Case, classify, parameter
from torch import nn

import fishfast as ff

GENERATOR = torch.Generator().manual_seed(1)
SIZES = [1, 2, 3, 4, 5, 6, 12]


def constant(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def adapter(self, x):
    return F.linear(torch.tanh(F.linear(x, self.w + self.b @ self.a)), self.head)


def two_adapters(self, x):
    """The second one's input has a gradient, and its product is of the same sizes."""
    hidden = torch.tanh(F.linear(x, self.w + self.b @ self.a))
    return F.linear(torch.tanh(F.linear(hidden, self.w2 + self.b2 @ self.a2)), self.head)


def with_magnitude(self, x):
    """DoRA: rows of a frozen weight, scaled by a learned vector."""
    weight = self.w + self.b @ self.a
    weight = self.m[:, None] * weight / weight.norm(dim=1, keepdim=True).detach()
    return F.linear(torch.tanh(F.linear(x, weight)), self.head)


def reflections(self, x):
    """HRA: a frozen weight times a product of Householder reflections."""
    turned = self.w
    for i in range(self.u.shape[1]):
        unit = self.u[:, i : i + 1] / self.u[:, i : i + 1].norm()
        turned = turned @ (torch.eye(6, dtype=x.dtype) - 2 * unit @ unit.mT)
    return F.linear(torch.tanh(F.linear(x, turned)), self.head)


def expert_parameters(self, x):
    """LoRA's target_parameters: a stack of frozen weights, each with an update."""
    stack = self.stack + torch.einsum("eor,eri->eoi", self.b3, self.a3)
    return sum(F.linear(torch.tanh(F.linear(x, weight)), self.head) for weight in stack)


def hypernetwork(self, x):
    """Learned vectors, one for each row of the weight, from which a network makes it."""
    return F.linear(torch.tanh(F.linear(x, self.net(self.z))), self.head)


def convolution(self, x):
    weight = (self.w + self.b @ self.a).view(12, 1, 6)
    return F.linear(torch.tanh(F.conv1d(x[:, None], weight)).flatten(1), self.head)


def grid(self, x):
    """A coordinate network: what it gives is added to every sample."""
    rows = torch.linspace(0, 1, 12, dtype=x.dtype) if self.made else self.grid
    field = self.net(rows.view(12, 1).expand(-1, 4)).mean(1)
    return F.linear(torch.tanh(F.linear(x, self.w) + field), self.head)


def made_by_einsum(self, x):
    return F.linear(torch.tanh(torch.einsum("bi,oi->bo", x, self.net(self.z))), self.head)


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6))


def low_rank():
    return {"w": constant(12, 6), "b": parameter(12, 2), "a": parameter(2, 6)}


MODELS = {
    "adapter": lambda: Calls(adapter, **low_rank()),
    "two-adapters": lambda: Calls(
        two_adapters, **low_rank(), w2=constant(12, 12), b2=parameter(12, 2), a2=parameter(2, 12)
    ),
    "magnitude": lambda: Calls(with_magnitude, **low_rank(), m=parameter(12)),
    "reflections": lambda: Calls(reflections, w=constant(12, 6), u=parameter(6, 2)),
    "stack": lambda: Calls(
        expert_parameters, stack=constant(3, 12, 6), b3=parameter(3, 12, 2), a3=parameter(3, 2, 6)
    ),
    "convolution": lambda: Calls(convolution, **low_rank()),
    "hypernetwork": lambda: Calls(hypernetwork, z=parameter(12, 4), net=net()),
    "hypernetwork-of-constants": lambda: Calls(hypernetwork, z=constant(12, 4), net=net()),
    "hypernetwork-by-einsum": lambda: Calls(made_by_einsum, z=constant(12, 4), net=net()),
    "grid": lambda: Calls(grid, w=constant(12, 6), grid=constant(12), made=False, net=net()),
    "grid-made-in-the-forward": lambda: Calls(grid, w=constant(12, 6), made=True, net=net()),
}


def case_of(make, sizes):
    torch.manual_seed(2)
    model = make()
    model.register_buffer("head", constant(3, 12))
    batches = [(constant(n, 6), torch.randint(0, 3, (n,), generator=GENERATOR)) for n in sizes]
    return Case(model, batches, classify)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_only_what_computes_a_weight_is_trained(name, size):
    case = case_of(MODELS[name], [size, size, 3])
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))


@pytest.mark.parametrize("name", ["adapter", "two-adapters", "magnitude", "stack", "convolution"])
def test_adapters_take_one_backward_a_batch(name):
    """Whatever the sizes: the weight is an operand where it meets the data."""
    fisher = score(case_of(MODELS[name], [4, 5]))
    assert not fisher.fallback


def between_samples(model, batch):
    out = model(batch[0])
    return F.cross_entropy(out @ out.mT, torch.arange(len(out)), reduction="none")


@pytest.mark.parametrize("name", ["adapter", "hypernetwork", "grid"])
def test_losses_between_samples_are_refused_all_the_same(name):
    case = case_of(MODELS[name], [4])
    case.model.first = nn.Linear(6, 6)
    run = case.model.run
    case.model.run = lambda self, x: run(self, self.first(x))
    with pytest.raises(ValueError, match=r"losses that depend on one sample each; .*'first\."):
        ff.estimate_fisher(case.model, case.batches, loss_fn=between_samples)
