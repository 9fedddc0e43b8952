"""The tap gives dW[indices], exactly, whatever the module does with its weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stepping import same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from train_only_modules import (
    MODULES,
    TOKENS,
    assert_tap_is_exact,
    built,
    copy_without_tap,
    dense_gradients,
    mask_over_all,
    numbers,
    square_loss,
)

import fishfast as ff
from fishfast.training.gradient import weight_tap


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_the_dense_ones(name: str) -> None:
    model, data = built(name)
    expected = dense_gradients(copy_without_tap(model, name), square_loss(data))
    tuned = ff.train_only(model, mask_over_all(model))
    assert_tap_is_exact(tuned, expected, square_loss(data))


@pytest.mark.parametrize("name", ["encoder layer, eval", "encoder, eval", "attention", "lstm"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_is_as_before(name: str, context: Any) -> None:
    model, data = built(name)
    model.eval()
    with context():
        expected = model(data)
    ff.train_only(model, mask_over_all(model))
    with context():
        assert same_bits(model(data), expected)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6 cannot compile through the tap"
)
@pytest.mark.parametrize("name", ["linear", "tied", "conv2d, channels_last", "bare parameters"])
def test_backward_through_a_compiled_model(name: str) -> None:
    model, data = built(name)
    expected = dense_gradients(copy_without_tap(model, name), square_loss(data))
    tuned = ff.train_only(model, mask_over_all(model))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_tap_is_exact(tuned, expected, lambda _: square_loss(data)(compiled))
    # A step changes the weights in place: the compiled model must see the new ones.
    ff.SGD(tuned.parameters(), lr=0.1).step()
    assert same_bits(compiled(data), model(data))


@pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6's vmap takes no int32 indices"
)
def test_functional_call_and_per_sample_gradients() -> None:
    model, data = built("linear")
    data = data[:, 0]
    tuned = ff.train_only(model, mask_over_all(model))
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    loss(parameters, data).backward()
    expected = {name: p.grad for name, p in tuned.named_parameters()}
    whole = torch.func.grad(loss)(parameters, data)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, data)
    for name, grad in expected.items():
        assert same_bits(whole[name], grad)
        torch.testing.assert_close(each[name].sum(0), grad)


def test_replaced_weight_in_functional_call() -> None:
    model, data = built("linear")
    other = numbers(5, 6, seed=9).requires_grad_()
    ff.train_only(model, mask_over_all(model))
    out = torch.func.functional_call(model, {"weight": other}, (data,))
    assert same_bits(out, F.linear(data, other, model.bias))


def test_autocast() -> None:
    model, data = built("called twice")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(data)
        tuned = ff.train_only(model, mask_over_all(model))
        assert same_bits(model(data), out)
        model(data).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in tuned.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_arrive_in_fp32(dtype: torch.dtype) -> None:
    model, data = built("linear")
    model, data = model.to(dtype), data.to(dtype)
    expected = dense_gradients(copy.deepcopy(model), square_loss(data))
    tuned = ff.train_only(model, mask_over_all(model))
    square_loss(data)(model).backward()
    for name, values in tuned.named_parameters():
        name = name.removesuffix("_values")
        assert same_bits(values.grad, expected[name].flatten()[tuned.mask[name].long()].float())


def test_embedding_with_sparse_gradients() -> None:
    model = nn.Embedding(11, 6, sparse=True)
    expected = dense_gradients(copy.deepcopy(model), square_loss(TOKENS))["weight"].to_dense()
    tuned = ff.train_only(model, mask_over_all(model))
    square_loss(TOKENS)(model).backward()
    (values,) = tuned.parameters()
    assert same_bits(values.grad, expected.flatten()[tuned.mask["weight"].long()])


def test_an_attribute_error_in_the_tap_is_no_plain_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python asks nn.Module for an attribute whose property lacks one: it has the frozen weight."""

    def lacks_something(*_: Any) -> None:
        raise AttributeError("torch has no stream")

    model = nn.Linear(3, 2)
    ff.train_only(model, ff.random_mask(model, k=2, seed=0))
    monkeypatch.setattr(weight_tap, "_tapped", lacks_something)
    with pytest.raises(RuntimeError, match=r"masked weight 'weight' cannot be read: torch has no"):
        model(torch.ones(1, 3))
