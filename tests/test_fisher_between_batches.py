"""A model that changes in a forward or between batches, and what adds to its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fishfast as ff

Batch = tuple[Tensor, Tensor]


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


def some_batches(count: int = 4, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(size, 6, generator=generator) for _ in range(2))  # type: ignore[misc]
        for _ in range(count)
    ]


def loop(
    model: nn.Module, batches: list[Batch], before: Callable[[int], Any] = lambda number: None
) -> dict[str, Tensor]:
    """Return the scores of a batch-1 loop in float64."""
    model.double()
    right = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for number, (x, y) in enumerate(batches):
        before(number)
        for i in range(len(x)):
            model.zero_grad()
            losses(model, (x[i : i + 1].double(), y[i : i + 1].double())).sum().backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    right[name] += p.grad.square()
    model.zero_grad()
    model.float()
    return right


def assert_scores(found: ff.Fisher, right: dict[str, Tensor]) -> None:
    for name, scores in right.items():
        torch.testing.assert_close(found[name].double(), scores, rtol=1e-4, atol=1e-9)


class Discriminated(nn.Module):
    """A layer that is used twice, once frozen."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.encoder, self.judge, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x).tanh()
        self.judge.requires_grad_(not self.first)
        one = self.judge(hidden).tanh()
        self.judge.requires_grad_(self.first)
        two = self.judge(2 * hidden).sin()
        self.judge.requires_grad_(True)
        return self.out(one + 3 * two)


@pytest.mark.parametrize("first", [False, True], ids=["second use frozen", "first use frozen"])
def test_a_frozen_use_of_a_layer_is_not_scored(first: bool) -> None:
    torch.manual_seed(0)
    model, batches = Discriminated(first), some_batches()
    right = loop(model, batches)
    assert_scores(ff.estimate_fisher(model, batches, loss_fn=losses), right)


@pytest.mark.parametrize("frozen", [{1}, {0, 3}, {2, 3}], ids=["second", "outer", "last two"])
def test_a_layer_that_is_frozen_for_some_batches_is_scored_in_the_others(frozen: set[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    batches = some_batches()

    def freeze(number: int) -> None:
        model[2].requires_grad_(number not in frozen)

    def freezing() -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            freeze(number)
            yield batch

    right = loop(model, batches, freeze)
    model.requires_grad_(True)
    assert_scores(ff.estimate_fisher(model, freezing(), loss_fn=losses), right)


def assign(model: nn.Sequential) -> None:
    model[0].load_state_dict({k: v.clone() for k, v in model[0].state_dict().items()}, assign=True)


def new_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def new_module(model: nn.Sequential) -> None:
    model[2] = nn.Sequential(nn.Linear(8, 6))


@pytest.mark.parametrize(
    ("replace", "name"),
    [
        (assign, "0.weight"),
        (new_parameter, "0.weight"),
        (new_module, "2"),
        (lambda model: nn.utils.parametrizations.weight_norm(model[0]), "0.weight"),
        (lambda model: delattr(model[0], "bias"), "0.bias"),
    ],
    ids=["assign", "parameter", "module", "parametrization", "taken away"],
)
def test_a_parameter_replaced_between_batches_is_refused_by_name(replace: Any, name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 6)))

    def replacing() -> Iterator[Batch]:
        for number, batch in enumerate(some_batches()):
            if number == 2:
                replace(model)
            yield batch

    with pytest.raises(ValueError, match=f"'{name}' was replaced between two batches"):
        ff.estimate_fisher(model, replacing(), loss_fn=losses)


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


def test_an_infinite_input_is_blamed_on_its_own_sample() -> None:
    (x, y), *_ = some_batches()
    x[2, 1] = float("inf")
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    with pytest.raises(ValueError, match=r"'0\.weight' is not for sample 2 of the batch"):
        ff.estimate_fisher(model, [(x, y)], loss_fn=losses)


def test_counts_over_the_batch_are_refused() -> None:
    bag = nn.EmbeddingBag(10, 6, mode="sum", scale_grad_by_freq=True)
    tokens = torch.randint(0, 10, (6, 5))
    with pytest.raises(ValueError, match="scale_grad_by_freq must be False for 'weight'"):
        ff.estimate_fisher(bag, [(tokens, torch.randn(6, 6))], loss_fn=losses)
