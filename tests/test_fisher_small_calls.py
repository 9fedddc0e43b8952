"""Recurrent nets with a weight that is used at every step: autograd's own backward costs less."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import assert_as_exact_as_a_loop, score, truth
from models import Calls, Case, classify
from torch import nn
from torch.utils.checkpoint import checkpoint

import fishfast as ff

GENERATOR = torch.Generator().manual_seed(6)
REASON = "used in 64 small calls or more, for which the samples are too few"


def by_step(step):
    def run(self, x):
        z = self.inner(x)
        state = torch.zeros_like(z[:, 0])
        for t in range(x.shape[1]):
            state = step(self, z[:, t], state)
        return self.out(state)

    return run


def independent(self, z, state):
    return torch.tanh(z + self.u * state)


def with_shift(self, z, state):
    return torch.tanh(z + self.u * state + self.shift)


def computed(self, z, state):
    """The operand is computed anew at every step."""
    return torch.tanh(z + torch.sigmoid(self.u) * state)


def dense(self, z, state):
    return torch.tanh(z + F.linear(state, self.w, self.shift))


def in_segments(self, x):
    """Half of the steps in checkpoints, then the others."""
    z = torch.tanh(self.inner(x))
    state = torch.zeros_like(z[:, 0])

    def segment(state, part):
        for t in range(part.shape[1]):
            state = independent(self, part[:, t], state)
        return state

    half = x.shape[1] // 2
    for part in z[:, :half].split(10, 1):
        state = checkpoint(segment, state, part, use_reentrant=False)
    return self.out(segment(state, z[:, half:]))


# Runs, sizes of the weights, and the names of those that are left to autograd.
MODELS = {
    "vector": (by_step(independent), {"u": (5,)}, {"u"}),
    "two-vectors": (by_step(with_shift), {"u": (5,), "shift": (5,)}, {"u", "shift"}),
    "computed": (by_step(computed), {"u": (5,)}, {"u"}),
    "matrix": (by_step(dense), {"w": (5, 5), "shift": (5,)}, {"w", "shift"}),
}


def net(run, sizes):
    """A net with small weights: the rounding of a step does not grow over the steps."""
    torch.manual_seed(0)
    weights = {name: nn.Parameter(0.3 * torch.randn(size)) for name, size in sizes.items()}
    return Calls(run, inner=nn.Linear(3, 5), out=nn.Linear(5, 3), **weights)


def batches_of(steps, *sizes):
    return [
        (torch.randn(n, steps, 3, generator=GENERATOR),
         torch.randint(0, 3, (n,), generator=GENERATOR))
        for n in sizes
    ]  # fmt: skip


def assert_exact(fisher, case):
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))


@pytest.mark.parametrize("sizes", [(4, 4, 2), (1, 3), (5,)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_many_small_calls_are_left_to_autograd(name, sizes):
    run, weights, left = MODELS[name]
    case = Case(net(run, weights), batches_of(90, *sizes), classify)
    fisher = score(case)
    assert_exact(fisher, case)
    assert set(fisher.fallback) == left
    assert all(reason == REASON for reason in fisher.fallback.values())
    assert REASON in fisher.report()
    assert fisher.passes["forward"] == len(sizes)
    assert fisher.passes["fallback"] == sum(sizes)


@pytest.mark.parametrize("steps", [63, 40])
@pytest.mark.parametrize("name", MODELS)
def test_fewer_calls_are_batched(name, steps):
    run, weights, _ = MODELS[name]
    case = Case(net(run, weights), batches_of(steps, 4, 4), classify)
    fisher = score(case)
    assert_exact(fisher, case)
    assert not fisher.fallback


def test_larger_calls_are_batched():
    """65 samples, more than the host's time for a call pays for."""
    run, weights, _ = MODELS["vector"]
    case = Case(net(run, weights), batches_of(70, 65), classify)
    fisher = score(case)
    assert_exact(fisher, case)
    assert not fisher.fallback


def test_steps_inside_checkpoints_are_caught_again_as_they_were():
    case = Case(net(in_segments, {"u": (5,)}), batches_of(160, 4, 3), classify)
    fisher = score(case)
    assert_exact(fisher, case)


def test_a_state_that_is_carried_over_is_no_reason_to_run_again():
    """The forward runs once for each batch, though the weight is left to autograd in the first."""
    run, weights, left = MODELS["vector"]
    model = net(run, weights)
    batches = batches_of(80, 4, 4, 4)

    class Carry:
        calls, state = 0, 0.0

        def __call__(self, model, batch):
            self.calls += 1
            losses = classify(model, batch) * (1 + self.state)
            self.state = losses.detach()
            return losses

    carry, expected = Carry(), torch.zeros(5)
    for batch in batches:
        for loss in carry(model, batch):
            expected += torch.autograd.grad(loss, model.u, retain_graph=True)[0].square()
    carry = Carry()
    fisher = ff.estimate_fisher(model, batches, loss_fn=carry)
    assert carry.calls == 3
    assert set(fisher.fallback) == left
    torch.testing.assert_close(fisher["u"], expected)
