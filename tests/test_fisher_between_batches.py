"""A model that changes in a forward or between batches, and batches that break a promise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batch_1_loop import Batch, assert_scores, loop, losses, some_batches
from torch import Tensor, nn
from torch.nn import functional as F

import fishfast as ff


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


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, 2 * x, x.flip(1)], 1)
        return self.out(self.inside(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_a_function_of_torch_that_was_replaced_later_is_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As kernels for attention are put in the place of torch's."""
    plain = F.scaled_dot_product_attention

    def replaced(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return plain(2 * q, k, v, *args, **kwargs).sin()

    monkeypatch.setattr(F, "scaled_dot_product_attention", replaced)
    torch.manual_seed(0)
    model, batches = Attention(), some_batches()
    right = loop(model, batches)
    assert_scores(ff.estimate_fisher(model, batches, loss_fn=losses), right)


class Dilated(nn.Module):
    """A list among a call's arguments, which the model changes between two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv = nn.Linear(6, 6), nn.Conv1d(1, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding, hidden = [1], self.up(x).tanh().unsqueeze(1)
        for size in (1, 2):
            padding[0] = size
            hidden = F.conv1d(hidden, self.conv.weight, self.conv.bias, 1, padding, padding)
        padding[0] = 7
        return hidden.squeeze(1)


def test_a_list_that_is_changed_after_a_call() -> None:
    torch.manual_seed(0)
    model, batches = Dilated(), some_batches()
    right = loop(model, batches)
    assert_scores(ff.estimate_fisher(model, batches, loss_fn=losses), right)


class OverSequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        empty = self.up(x[:, None][:, :0])
        return self.down(x) + empty.sum(1)


def test_sequences_without_elements() -> None:
    torch.manual_seed(0)
    model, batches = OverSequences(), some_batches()
    right = loop(model, batches)
    assert_scores(ff.estimate_fisher(model, batches, loss_fn=losses), right)
