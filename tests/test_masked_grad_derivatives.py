"""Masked layers under derivatives of derivatives and torch.func: as with dense gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from masked_grad_models import (
    assert_all,
    built,
    weights_mask,
)
from torch import Tensor, nn

import fishfast as ff


def assert_as_dense(
    model: nn.Module, data: Tensor, run: Callable[[nn.Module, Tensor], None], style: str
) -> None:
    """Run a backward on the model, dense in fp32 and float64, then masked; compare."""
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    run(plain, data)
    run(exact, data.double())
    ff.train_only(model, weights_mask(model, style), dense_gradient_limit=0)
    run(model, data)
    assert_all(
        model,
        *({n: p.grad for n, p in other.named_parameters()} for other in (plain, exact)),
    )


@pytest.mark.parametrize("style", ["few", "all"])
@pytest.mark.parametrize("name", ["deep", "convs", "frozen between"])
def test_penalty_on_the_gradient_of_the_input(name: str, style: str) -> None:
    model, data = built(name)

    def penalty(model: nn.Module, data: Tensor) -> None:
        data = data.clone().requires_grad_()
        out = model(data).square().sum()
        (grad,) = torch.autograd.grad(out, data, create_graph=True)
        grad.square().sum().backward()

    assert_as_dense(model, data, penalty, style)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["deep", "convs smooth"])
def test_loss_of_higher_derivatives_of_the_input(name: str, order: int) -> None:
    """As in physics-informed networks, whose loss holds second derivatives."""
    model, data = built(name)

    def derivatives(model: nn.Module, data: Tensor) -> None:
        data = data.clone().requires_grad_()
        out = model(data).square()
        for _ in range(order):
            (out,) = torch.autograd.grad(out.sum(), data, create_graph=True)
        out.square().sum().backward()

    assert_as_dense(model, data, derivatives, "all")


@pytest.mark.parametrize("limit", [0, 2**26], ids=["never dense", "tap"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["deep", "convs smooth", "in place", "tied", "called twice"])
def test_gradients_of_the_values_are_differentiated(name: str, order: int, limit: int) -> None:
    """A penalty on the gradient of what trains, and derivatives of that."""
    model, data = built(name)
    mask = weights_mask(model)
    tuned = ff.train_only(copy.deepcopy(model), mask, dense_gradient_limit=limit)

    def penalty(module: nn.Module, trained: dict[str, Tensor]) -> None:
        out = module(data.to(next(module.parameters()).dtype) if data.is_floating_point() else data)
        out = out.square().sum()
        for _ in range(order):
            grads = torch.autograd.grad(out, list(trained.values()), create_graph=True)
            chosen = zip(trained, grads, strict=True)
            out = sum(
                (grad if grad.dim() == 1 else grad.flatten()[mask[key].long()]).square().sum()
                for key, grad in chosen
            )
        out.backward()

    dense = []
    for dtype in (torch.float32, torch.float64):
        plain = copy.deepcopy(model).to(dtype)
        weights = {n: p for n, p in plain.named_parameters() if n in mask and len(mask[n])}
        penalty(plain, weights)
        dense.append({n: p.grad for n, p in weights.items()})
    own = {n.removesuffix("_values"): p for n, p in tuned.named_parameters()}
    penalty(tuned.model, own)
    assert_all(tuned.model, *dense)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6's vmap takes no int32 indices"
)
@pytest.mark.parametrize("name", ["deep", "convs", "in place"])
@pytest.mark.parametrize("style", ["few", "few rows"])
def test_per_sample_gradients(name: str, style: str) -> None:
    model, data = built(name)
    tuned = ff.train_only(model, weights_mask(model, style), dense_gradient_limit=0)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    loss(parameters, data).backward()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, data)
    for key, values in tuned.named_parameters():
        for sample, grad in zip(data, each[key], strict=True):
            (alone,) = torch.autograd.grad(loss(parameters, sample), values)
            torch.testing.assert_close(grad, alone)
        torch.testing.assert_close(each[key].sum(0), values.grad)
