"""`torch.func.functional_call` with other values: a weight is seen with these in their places."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from masked_grad_cases import CASES, masked_entries, tuned_layer
from stepping import mask_of, same_bits
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from train_only_modules import MODULES, built, copy_without_tap, mask_over_all, numbers

import fishfast as ff

Values = dict[str, Tensor]


def other_values(tuned: ff.SparseTuning, seed: int = 3) -> Values:
    """Return compact parameters, by name, that are other tensors with other values."""
    return {
        name: p.detach() + 0.1 * numbers(len(p), seed=seed + i)
        for i, (name, p) in enumerate(tuned.named_parameters())
    }


def with_values(plain: nn.Module, mask: ff.SparseMask, values: Values) -> Values:
    """Return a plain model's parameters with values in the places of a mask."""
    found = {}
    for name, p in plain.named_parameters():
        flat = p.detach().flatten()
        if f"{name}_values" in values:
            flat = flat.index_put((mask[name].long(),), values[f"{name}_values"].to(p.dtype))
        found[name] = flat.view(p.shape)
    return found


def losses(
    plain: nn.Module, tuned: ff.SparseTuning, data: Tensor
) -> tuple[Callable[[Values], Tensor], Callable[[Values], Tensor]]:
    """Return a loss of the values by the tuned model, and the oracle by the plain one."""

    def of_tuned(values: Values) -> Tensor:
        return functional_call(tuned.model, values, (data,)).square().sum()

    def of_plain(values: Values) -> Tensor:
        parameters = with_values(plain, tuned.mask, values)
        return functional_call(plain, parameters, (data,)).square().sum()

    return of_tuned, of_plain


def leaves(values: Values) -> Values:
    return {name: v.detach().clone().requires_grad_() for name, v in values.items()}


# What a module computes from its weights by hooks or parametrizations has other names; nn.LSTM
# looks at its list of weights, which functional_call does not change in a plain model either.
_OTHER_NAMES = ("norm", "orthogonal", "own param", "checkpoint", "lists", "tied")
NAMES = [name for name in MODULES if not any(part in name for part in _OTHER_NAMES)]


@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradient_are_those_of_the_dense_weights(name: str) -> None:
    model, data = built(name)
    plain = copy_without_tap(model, name)
    tuned = ff.train_only(model, mask_over_all(model))
    before = copy.deepcopy(model.state_dict())
    values = other_values(tuned)
    found, expected = losses(plain, tuned, data)
    with torch.no_grad():
        assert same_bits(found(values), expected(values))
    of_tuned, of_plain = leaves(values), leaves(values)
    found(of_tuned).backward()
    expected(of_plain).backward()
    for key, v in of_tuned.items():
        torch.testing.assert_close(v.grad, of_plain[key].grad)
    assert all(p.grad is None for p in model.parameters())
    assert all(same_bits(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("limit", [0, 2**26])
@pytest.mark.parametrize(
    "name", ["linear", "gpt2", "conv2d", "conv2d, groups", "embedding, padding"]
)
def test_layers_with_a_forward_of_their_own(name: str, limit: int) -> None:
    torch.manual_seed(0)
    make, x = CASES[name]
    layer = make()
    plain = copy.deepcopy(layer)
    mask = mask_of(layer, {"weight": masked_entries(layer.weight.shape, "few")})
    tuned = ff.train_only(layer, mask, dense_gradient_limit=limit)
    values = other_values(tuned)
    found, expected = losses(plain, tuned, x)
    assert same_bits(found(values), expected(values))
    of_tuned, of_plain = leaves(values), leaves(values)
    (first,) = torch.autograd.grad(found(of_tuned), list(of_tuned.values()), create_graph=True)
    (second,) = torch.autograd.grad(expected(of_plain), list(of_plain.values()), create_graph=True)
    torch.testing.assert_close(first, second)
    first.square().sum().backward()
    second.square().sum().backward()
    torch.testing.assert_close(of_tuned["weight_values"].grad, of_plain["weight_values"].grad)


@pytest.fixture
def pair() -> tuple[Callable[[Values], Tensor], Callable[[Values], Tensor], Values]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    plain = copy.deepcopy(model)
    tuned = ff.train_only(model, mask_over_all(model))
    return *losses(plain, tuned, numbers(4, 6)), other_values(tuned)


def assert_close(found: Values, expected: Values) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_grad(pair) -> None:
    found, expected, values = pair
    assert_close(grad(found)(values), grad(expected)(values))


def test_gradient_of_a_gradient(pair) -> None:
    """MAML: the loss after an inner step, differentiated through that step."""

    def after_a_step(loss: Callable[[Values], Tensor]) -> Callable[[Values], Tensor]:
        def outer(values: Values) -> Tensor:
            grads = grad(loss)(values)
            return loss({name: v - 0.1 * grads[name] for name, v in values.items()})

        return outer

    found, expected, values = pair
    assert_close(grad(after_a_step(found))(values), grad(after_a_step(expected))(values))
    assert after_a_step(found)(values) < found(values)


def test_vmap_over_several_values(pair) -> None:
    found, expected, values = pair
    many = {name: torch.stack([v, 2 * v, -v]) for name, v in values.items()}
    torch.testing.assert_close(vmap(found)(many), vmap(expected)(many))
    assert_close(vmap(grad(found))(many), vmap(grad(expected))(many))


def test_jvp(pair) -> None:
    found, expected, values = pair
    direction = {name: torch.ones_like(v) for name, v in values.items()}
    for one, other in zip(
        jvp(found, (values,), (direction,)), jvp(expected, (values,), (direction,)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_hessian(pair) -> None:
    found, expected, values = pair
    name = "0.weight_values"
    for one, other in [(hessian(found)(values), hessian(expected)(values))]:
        assert_close(one[name], other[name])


def test_own_parameters_train_as_in_a_plain_call(pair) -> None:
    model = nn.Linear(6, 5)
    tuned = ff.train_only(model, mask_over_all(model))
    functional_call(model, dict(tuned.named_parameters()), (numbers(4, 6),)).sum().backward()
    found = [p.grad.clone() for p in tuned.parameters()]
    model.zero_grad()
    model(numbers(4, 6)).sum().backward()
    assert all(same_bits(p.grad, g) for p, g in zip(tuned.parameters(), found, strict=True))


def test_line_search_finds_what_a_step_finds() -> None:
    """The loss at given values is that after they were written into the parameters."""
    model = nn.Linear(8, 4)
    tuned = ff.train_only(model, ff.random_mask(model, density=0.3, seed=0))
    x = numbers(2, 8)
    values = other_values(tuned)
    expected = functional_call(model, values, (x,))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            p.copy_(values[name])
    assert same_bits(model(x), expected)


def test_gradient_of_a_given_weight() -> None:
    tuned = tuned_layer(nn.Linear(6, 5), "few")
    weight, x = numbers(5, 6, seed=4).requires_grad_(), numbers(3, 6)
    functional_call(tuned.model, {"weight": weight}, (x,)).square().sum().backward()
    expected = weight.detach().clone().requires_grad_()
    nn.functional.linear(x, expected, tuned.model.bias).square().sum().backward()
    torch.testing.assert_close(weight.grad, expected.grad)
