"""Backwards that add to gradients, hooks on weights, and a loss_fn that calls backward() itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batch_1_loop import assert_scores, loop, losses, some_batches
from torch import Tensor, nn
from torch.nn import functional as F

import fishfast as ff


class Penalty(torch.autograd.Function):
    """An activity penalty that is in the backward alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 0.01 * ctx.saved_tensors[0].sign()


def add_in_hook(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad + 0.01 * x.detach().sign())
    return x


class Penalized(nn.Module):
    def __init__(self, penalty: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.slope, self.down = nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 6)
        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.penalty(self.slope(self.up(x)).tanh()))


PENALTIES = pytest.mark.parametrize(
    "penalty", [Penalty.apply, add_in_hook], ids=["function", "hook"]
)


@PENALTIES
def test_what_adds_to_gradients_is_refused(penalty: Any) -> None:
    with pytest.raises(ValueError, match="adds to those of samples whose losses weigh 0"):
        ff.estimate_fisher(Penalized(penalty), some_batches(), loss_fn=losses)


@PENALTIES
def test_what_adds_to_gradients_is_exact_in_batches_of_one_sample(penalty: Any) -> None:
    torch.manual_seed(0)
    model, batches = Penalized(penalty), some_batches(count=5, size=1)
    right = loop(model, batches)
    assert_scores(ff.estimate_fisher(model, batches, loss_fn=losses), right)


MASK = (torch.rand(8, 6, generator=torch.Generator().manual_seed(3)) > 0.5).double()


class Hooked(nn.Module):
    """A hook on what is computed from a weight, which may be used as it is before."""

    def __init__(self, make: Any, hook: Any, used_before: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.make, self.hook, self.used_before = make, hook, used_before

    def forward(self, x: Tensor) -> Tensor:
        before = self.up(x).sin() if self.used_before else 0
        weight = self.make(self.up.weight)
        if weight.requires_grad:
            weight.register_hook(self.hook)
        return self.down(F.linear(x, weight, self.up.bias).tanh() + before)


@pytest.mark.parametrize("used_before", [False, True], ids=["alone", "used before"])
@pytest.mark.parametrize(
    ("make", "hook"),
    [
        (lambda w: w.view_as(w), lambda grad: grad * MASK.to(grad.dtype)),
        (lambda w: w[:], lambda grad: 3 * grad),
        (lambda w: w.t().t(), lambda grad: grad / grad.norm()),
        (lambda w: w.clone(), lambda grad: grad * MASK.to(grad.dtype)),
        (lambda w: 1 + w, lambda grad: grad.clamp(-0.01, 0.01)),
        (lambda w: w * 1.0, lambda grad: grad / grad.norm()),
    ],
    ids=["view", "slice", "transposed", "clone", "added to", "scaled"],
)
def test_a_hook_on_what_is_computed_from_a_weight_sees_each_samples_gradient(
    make: Any, hook: Any, used_before: bool
) -> None:
    torch.manual_seed(0)
    model, batches = Hooked(make, hook, used_before), some_batches()
    right = loop(model, batches)
    found = ff.estimate_fisher(model, batches, loss_fn=losses)
    assert_scores(found, right)
    assert "a hook is on a tensor that is computed from it" in found.fallback["up.weight"]


class HookedLate(nn.Module):
    """A hook on a view of a weight that was used already."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up.weight.view_as(self.up.weight)
        hidden = F.linear(x, weight, self.up.bias)
        if weight.requires_grad:
            weight.register_hook(lambda grad: grad / grad.norm())
        return self.down(hidden.tanh())


def test_a_hook_on_a_view_of_a_weight_after_its_use() -> None:
    torch.manual_seed(0)
    model, batches = HookedLate(), some_batches()
    right = loop(model, batches)
    assert_scores(ff.estimate_fisher(model, batches, loss_fn=losses), right)


class Decay(torch.autograd.Function):
    """A weight decay that is in the weight's backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 0.01 * ctx.saved_tensors[0].sign()


class Decayed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.linear(x, Decay.apply(self.up.weight), self.up.bias).tanh())


def test_what_a_weights_own_backward_adds_is_each_samples() -> None:
    torch.manual_seed(0)
    model, batches = Decayed(), some_batches()
    right = loop(model, batches)
    assert_scores(ff.estimate_fisher(model, batches, loss_fn=losses), right)


def adversarial(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Losses at a step along the gradient's sign, which a backward() of its own gives."""
    x = batch[0].clone().requires_grad_()
    model(x).sum().backward()
    model.zero_grad()
    assert x.grad is not None
    return losses(model, (batch[0] + 0.1 * x.grad.sign(), batch[1]))


def test_a_loss_fn_that_calls_backward_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    batches = some_batches()
    right = loop(model, batches, loss_fn=adversarial)
    assert_scores(ff.estimate_fisher(model, batches, loss_fn=adversarial), right)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_that_a_loss_fn_leaves_in_the_weights_are_refused() -> None:
    def leaves_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        model(batch[0]).sum().backward()
        return losses(model, batch)

    model = nn.Linear(6, 6)
    with pytest.raises(ValueError, match=r"nor a loss_fn or a hook call backward\(\)"):
        ff.estimate_fisher(model, some_batches(), loss_fn=leaves_gradients)
    assert model.weight.grad is None
