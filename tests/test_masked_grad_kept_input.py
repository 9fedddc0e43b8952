"""A linear layer keeps the columns of its input that have masked entries, if nobody keeps more."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from copying import pickled
from masked_grad_cases import assert_gradient, masked_entries
from stepping import mask_of, same_bits
from torch import Tensor, nn
from train_only_modules import numbers
from transformers.pytorch_utils import Conv1D

import fishfast as ff
from fishfast.training.gradient import costs, kept_input

X = numbers(3, 7, 20)
LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: nn.Linear(40, 30), "few columns"),
    "gpt2": (lambda: Conv1D(30, 40), "few rows"),
}


class Net(nn.Module):
    """A layer behind an activation."""

    def __init__(self, layer: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.activation = nn.Linear(20, 40), layer, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.activation(self.first(x)))


def net(
    name: str, activation: Callable[[Tensor], Tensor] = nn.functional.gelu, style: str = ""
) -> tuple[Net, ff.SparseMask]:
    torch.manual_seed(0)
    make, few = LAYERS[name]
    model = Net(make(), activation)
    entries = masked_entries(model.layer.weight.shape, style or few)
    return model, mask_of(model, {"layer.weight": entries})


def kept(run: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes of the fp32 tensors with a batch that a forward keeps."""
    found: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() > 2 and tensor.is_floating_point():
            found[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sorted(found.values())


@pytest.fixture(params=["sums", "chunks"], autouse=True)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_SUM", 0.0 if request.param == "sums" else float("inf"))
    monkeypatch.setattr(costs, "_TRANSPOSE", 0.0)
    monkeypatch.setattr(kept_input, "_last", (kept_input._nothing, kept_input._nothing))


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, pickled])
@pytest.mark.parametrize("name", LAYERS)
def test_from_the_second_pass_on_few_columns_are_kept(
    name: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model, mask = net(name)
    exact = copy.deepcopy(model).double()
    by_torch = copy.deepcopy(model)
    for plain, x in ((by_torch, X), (exact, X.double())):
        plain(x).square().sum().backward()
    ff.train_only(model, mask, dense_gradient_limit=0)
    found, shapes = [], []
    for _ in range(3):
        x = X.clone().requires_grad_()  # a graph behind the layer
        shapes.append(kept(lambda x=x, model=model: model(x)))
        model.zero_grad()
        model(x).square().sum().backward()
        values = model.layer.weight_values
        found.append(values.grad.clone())
        model = copied(model)
    num_columns = 40 // 3
    whole, narrow = [(3, 7, 40), (3, 7, 40)], [(3, 7, num_columns), (3, 7, 40)]
    assert shapes == [whole, narrow, narrow]  # the gelu keeps its own input
    assert all(same_bits(grad, found[0]) for grad in found)
    assert_gradient(
        found[0], mask["layer.weight"], by_torch.layer.weight.grad, exact.layer.weight.grad
    )


@pytest.mark.parametrize(
    "activation", [torch.relu, torch.tanh, torch.sigmoid, lambda x: torch.softmax(x, -1)]
)
def test_what_an_activation_keeps_is_not_copied(activation: Callable[[Tensor], Tensor]) -> None:
    model, mask = net("linear", activation)
    ff.train_only(model, mask, dense_gradient_limit=0)
    for _ in range(3):
        x = X.clone().requires_grad_()
        assert (3, 7, 40) in kept(lambda x=x: model(x))
        assert len(kept(lambda x=x: model(x))) == 1


def test_an_input_of_several_layers_is_kept_once() -> None:
    torch.manual_seed(0)
    first, layers = nn.Linear(20, 40), [nn.Linear(40, 30) for _ in range(3)]
    model = nn.ModuleList([first, *layers])
    entries = masked_entries(layers[0].weight.shape, "few columns")
    mask = mask_of(model, {f"{i}.weight": entries for i in (1, 2, 3)})
    ff.train_only(model, mask, dense_gradient_limit=0)

    def run(x: Tensor) -> Tensor:
        y = nn.functional.gelu(first(x))
        return torch.stack([layer(y) for layer in layers]).sum()

    for _ in range(3):
        x = X.clone().requires_grad_()
        assert kept(lambda x=x: run(x)).count((3, 7, 40)) == 2  # gelu's input and this
        assert kept(lambda x=x: run(x)).count((3, 7, 13)) == 0


def test_the_input_of_the_model_is_not_copied() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    mask = mask_of(layer, {"weight": masked_entries(layer.weight.shape, "few columns")})
    ff.train_only(layer, mask, dense_gradient_limit=0)
    for _ in range(3):
        x = numbers(3, 7, 40)
        assert kept(lambda x=x: layer(x)) == [(3, 7, 40)]


def test_a_mask_of_all_columns_keeps_the_input() -> None:
    model, mask = net("linear", style="some")
    ff.train_only(model, mask, dense_gradient_limit=0)
    for _ in range(3):
        x = X.clone().requires_grad_()
        assert kept(lambda x=x: model(x)) == [(3, 7, 40), (3, 7, 40)]


def test_another_mask_keeps_other_columns() -> None:
    model, mask = net("linear")
    tuned = ff.train_only(model, mask, dense_gradient_limit=0)
    for _ in range(2):
        model(X.clone().requires_grad_()).sum().backward()
    before = model.layer.weight_values.target.columns.columns
    with tuned.released() as plain:
        other = mask_of(plain, {"layer.weight": torch.tensor([3, 41], dtype=torch.int32)})
    tuned.remask(other)
    for _ in range(3):
        model.zero_grad()
        model(X.clone().requires_grad_()).sum().backward()
    assert model.layer.weight_values.target.columns.columns.tolist() == [1, 3]
    assert len(before) == 13


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_of_the_gradient(name: str) -> None:
    """A penalty on the gradients of input and values is differentiated through the kept columns."""
    model, mask = net(name, nn.functional.gelu)
    plain = copy.deepcopy(model).double()
    ff.train_only(model, mask, dense_gradient_limit=0)
    entries = mask["layer.weight"].long()

    def penalty(module: Net, trained: Tensor, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        loss = module(x).square().sum()
        of_x, of_values = torch.autograd.grad(loss, [x, trained], create_graph=True)
        of_values = of_values if of_values.dim() == 1 else of_values.flatten()[entries]
        (of_values.square().sum() + of_x.square().sum()).backward()
        return trained.grad

    expected = penalty(plain, plain.layer.weight, X.double()).flatten()[entries]
    for _ in range(3):
        model.zero_grad()
        found = penalty(model, model.layer.weight_values, X)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
