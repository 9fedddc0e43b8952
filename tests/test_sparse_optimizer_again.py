"""A step that goes by what the last one checked does what a step that checks all again does."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparse_optimizer_makers import MAKERS, Make, half_mask, small_net
from torch import Tensor, nn

import fishfast as ff


class Trained:
    """A small model in training; ``checks_all``: it forgets each step before the next."""

    def __init__(self, make: Make, checks_all: bool) -> None:
        self.model = small_net()
        self.tuned = ff.train_only(self.model, half_mask(self.model))
        self.plain = nn.Parameter(torch.ones(3))
        self.optimizer: Any = make([*self.tuned.parameters(), self.plain], backend="cpu")
        self.checks_all = checks_all

    @property
    def values(self) -> list[Any]:
        return list(self.tuned.parameters())

    def backward(self, seed: int) -> None:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        with contextlib.suppress(RuntimeError):  # what an event broke
            (self.model(x) * self.plain).square().mean().backward()

    def step(self) -> str:
        """Take a step; return the error, if there is one."""
        if self.checks_all:
            self.optimizer._last = None
        try:
            self.optimizer.step()
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def bits(self) -> dict[str, Any]:
        found = {name: w.detach().clone() for name, w in self.model.named_parameters()}
        found["plain"] = self.plain.detach().clone()
        for position, values in enumerate([*self.values, self.plain]):
            for name, value in self.optimizer.state.get(values, {}).items():
                if isinstance(value, Tensor):
                    found[f"{position} {name}"] = value.clone()
        return found


Event = Callable[[Trained, int], object]


def _weight(trained: Trained, seed: int) -> nn.Parameter:
    return trained.values[seed % len(trained.values)].target.weight()


@torch.no_grad()
def write_weight(trained: Trained, seed: int) -> None:
    _weight(trained, seed).mul_(1.5)


@torch.no_grad()
def write_values(trained: Trained, seed: int) -> None:
    trained.values[seed % 4].add_(0.25)


def replace_weight_data(trained: Trained, seed: int) -> None:
    weight = _weight(trained, seed)
    weight.data = weight.data.clone() * 2


def replace_values_data(trained: Trained, seed: int) -> None:
    values = trained.values[seed % 4]
    values.data = values.detach().clone() + 1


def replace_weight(trained: Trained, seed: int) -> None:
    state = {name: 0.5 * w.clone() for name, w in trained.model.state_dict().items()}
    trained.model.load_state_dict(state, assign=True)


def to_bfloat16(trained: Trained, seed: int) -> None:
    trained.model.to(torch.bfloat16)
    trained.model.to(torch.float32)


def drop_a_gradient(trained: Trained, seed: int) -> None:
    trained.values[seed % 4].grad = None


def drop_gradients(trained: Trained, seed: int) -> None:
    trained.optimizer.zero_grad()


def strided_gradient(trained: Trained, seed: int) -> None:
    values = trained.values[seed % 4]
    values.grad = torch.ones(2 * values.numel())[::2]


def double_gradient(trained: Trained, seed: int) -> None:
    _gradient(trained, seed).data = torch.ones(trained.values[seed % 4].shape, dtype=torch.float64)


def short_gradient(trained: Trained, seed: int) -> None:
    _gradient(trained, seed).data = torch.ones(2)


def _gradient(trained: Trained, seed: int) -> Tensor:
    values = trained.values[seed % 4]
    values.grad = torch.ones_like(values)
    return values.grad


def replace_plain_data(trained: Trained, seed: int) -> None:
    trained.plain.data = trained.plain.data + 1


def reinterpret_weight(trained: Trained, seed: int) -> None:
    weight = _weight(trained, seed)
    weight.data = weight.data.view(torch.int32)


def replace_state_tensor(trained: Trained, seed: int) -> None:
    for state in trained.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[name] = value + 0.125


def replace_state_data(trained: Trained, seed: int) -> None:
    for state in trained.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.dim():
                value.data = value.data + 0.25


def set_step_back(trained: Trained, seed: int) -> None:
    for state in trained.optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


def forget_state(trained: Trained, seed: int) -> None:
    trained.optimizer.state.pop(trained.values[seed % 4], None)


def wrong_state(trained: Trained, seed: int) -> None:
    for name in ("exp_avg", "momentum_buffer"):
        state = trained.optimizer.state.get(trained.values[0], {})
        if name in state:
            state[name] = torch.zeros(3)


def another_option(trained: Trained, seed: int) -> None:
    group = trained.optimizer.param_groups[0]
    group["lr"] *= 0.5
    group["maximize"] = not group["maximize"]
    if "amsgrad" in group:
        group["amsgrad"] = not group["amsgrad"]
    else:
        group["momentum"] = 0.0 if group["momentum"] else 0.9


def bad_option(trained: Trained, seed: int) -> None:
    trained.optimizer.param_groups[0]["lr"] = "fast"


def fewer_parameters(trained: Trained, seed: int) -> None:
    trained.optimizer.param_groups[0]["params"] = trained.values[: 3 - seed % 2]


def split_group(trained: Trained, seed: int) -> None:
    group = trained.optimizer.param_groups[0]
    if len(group["params"]) > 1:
        last = group["params"].pop()
        trained.optimizer.add_param_group({"params": [last], "lr": 0.01})


def replace_group(trained: Trained, seed: int) -> None:
    groups = trained.optimizer.param_groups
    groups[0] = {**groups[0], "lr": 0.5 * groups[0]["lr"]}


def another_group(trained: Trained, seed: int) -> None:
    extra = nn.Parameter(torch.ones(2))
    extra.grad = torch.ones(2)
    trained.optimizer.add_param_group({"params": [extra]})


def load_own_state(trained: Trained, seed: int) -> None:
    trained.optimizer.load_state_dict(trained.optimizer.state_dict())


def remask(trained: Trained, seed: int) -> None:
    trained.tuned.rebase()  # after writes to weights outside the mask
    trained.tuned.remask(half_mask(small_net(), seed), optimizer=trained.optimizer)


def release(trained: Trained, seed: int) -> None:
    trained.tuned.release()
    trained.tuned = ff.train_only(trained.model, half_mask(small_net(), seed))


EVENTS: list[Event] = [
    write_weight, write_values, replace_weight_data, replace_values_data, replace_weight,
    to_bfloat16, drop_a_gradient, drop_gradients, strided_gradient, replace_state_tensor,
    double_gradient, short_gradient, replace_plain_data, reinterpret_weight, replace_state_data,
    set_step_back, forget_state, wrong_state, another_option, bad_option, fewer_parameters,
    split_group, replace_group, another_group, load_own_state, remask, release,
]  # fmt: skip


def go_on(pair: tuple[Trained, Trained], seed: int) -> bool:
    """Take a step with each; both must have come to the same. Return whether that was an error."""
    errors = [trained.step() for trained in pair]
    assert errors[0] == errors[1]
    bits, others = (trained.bits() for trained in pair)
    assert bits.keys() == others.keys()
    assert all(torch.equal(bits[key], others[key]) for key in bits)
    return bool(errors[0])


@MAKERS
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_what_happens_between_steps_is_noticed(make: Make, event: Event) -> None:
    pair = Trained(make, checks_all=False), Trained(make, checks_all=True)
    for before in (True, False):  # the gradients are of before the event, or of after it
        for seed in range(4):
            for trained in pair:
                if seed < 2:
                    trained.backward(seed)
                elif before:
                    trained.backward(seed)
                    event(trained, seed)
                else:
                    event(trained, seed)
                    trained.backward(seed)
            go_on(pair, seed)


@MAKERS
@pytest.mark.parametrize("start", range(2))
def test_any_course_of_events_comes_to_the_same(make: Make, start: int) -> None:
    chance = random.Random(start)
    for _ in range(4):
        pair = Trained(make, checks_all=False), Trained(make, checks_all=True)
        for seed in range(12):
            event = chance.choice(EVENTS) if chance.random() < 0.4 else None
            for trained in pair:
                trained.backward(seed)
                if event is not None:
                    event(trained, seed)
            if go_on(pair, seed):
                break  # most errors stay


@MAKERS
def test_an_undisturbed_step_goes_by_the_last_one(make: Make, monkeypatch: Any) -> None:
    trained = Trained(make, checks_all=False)
    for seed in range(2):
        trained.backward(seed)
        assert not trained.step()

    def checked(*_: Any) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr("fishfast.sparse_optimizer.checked", checked)
    trained.optimizer.zero_grad()
    trained.backward(2)
    assert not trained.step()


@MAKERS
def test_gradients_are_freed_by_zero_grad(make: Make) -> None:
    trained = Trained(make, checks_all=False)
    for seed in range(3):
        trained.backward(seed)
        trained.step()
        gradients = [weakref.ref(values.grad) for values in trained.values]
        trained.optimizer.zero_grad()
        assert [gradient() for gradient in gradients] == [None] * 4
