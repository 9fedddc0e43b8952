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


def test_the_gradient_of_the_values_is_not_differentiated_silently() -> None:
    model, data = built("deep")
    tuned = ff.train_only(model, weights_mask(model), dense_gradient_limit=0)
    loss = model(data).square().sum()
    grads = torch.autograd.grad(loss, list(tuned.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(grad.sum() for grad in grads).backward()


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
