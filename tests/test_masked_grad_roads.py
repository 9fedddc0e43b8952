"""Masked layers within models: what surrounds them works as with dense gradients."""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from copying import pickled, pickled_with_protocol_0, saved_by_torch
from masked_grad_cases import CASES, assert_gradient, cotangent, tuned_layer
from masked_grad_models import (
    IMAGES,
    MODELS,
    TiedToAttention,
    X,
    assert_all,
    built,
    dense,
    weights_mask,
)
from stepping import mask_of, same_bits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_only_modules import TOKENS, TiedNet, numbers
from transformers.pytorch_utils import Conv1D

import fishfast as ff
from fishfast.training.gradient import chunks as masked_grad_plan
from fishfast.training.gradient.weight_tap import KeptTap


@pytest.mark.parametrize("style", ["few", "few rows", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_model(name: str, style: str) -> None:
    model, data = built(name)
    by_torch, exact = (dense(model, data, dtype) for dtype in (torch.float32, torch.float64))
    ff.train_only(model, weights_mask(model, style), dense_gradient_limit=0)
    model(data).square().sum().backward()
    assert_all(model, by_torch, exact)


class Products(TorchDispatchMode):
    """Counts the products of convolutions, and which gradients each of their backwards gives."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.asked.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_masked_bias_of_a_convolution(layer: type[nn.Module], batched: bool) -> None:
    """Its gradient is summed here: torch's backward would compute a dense weight gradient too."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(3, 20, 3), nn.ReLU(inplace=True), layer(20, 6, 2))
    dims = model[0].weight.dim() - 2
    data = numbers(*([4] if batched else []), 3, *[7] * dims)
    by_torch, exact = (dense(model, data, dtype) for dtype in (torch.float32, torch.float64))
    biases = {"0.bias": torch.arange(0, 20, 2, dtype=torch.int32), "2.bias": torch.arange(6)}
    weights = weights_mask(model)
    ff.train_only(model, mask_of(model, {**weights, **biases}), dense_gradient_limit=0)
    with Products() as products:
        model(data).square().sum().backward()
    assert_all(model, by_torch, exact)
    of_our_own = {"0.weight_values", "0.bias_values", "2.weight_values", "2.bias_values"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == of_our_own
    # The gradient of the first layer's output, then the rows of dW chunk by chunk: never a bias.
    assert [True, False, False] in products.asked
    assert not any(bias for *_, bias in products.asked)


def test_a_convolution_with_plain_numbers() -> None:
    """As in ``layer.stride = 1``, which turns a classifier into a segmentation model."""
    model = nn.Conv2d(3, 10, 3)
    model.stride, model.padding, model.dilation = 2, 1, 2
    by_torch, exact = (dense(model, IMAGES, dtype) for dtype in (torch.float32, torch.float64))
    ff.train_only(model, weights_mask(model), dense_gradient_limit=0)
    model(IMAGES).square().sum().backward()
    assert_all(model, by_torch, exact)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6 cannot compile through the tap"
)
@pytest.mark.parametrize("name", ["deep", "convs", "in place", "tied", "called twice"])
def test_compiled_model(name: str) -> None:
    model, data = built(name)
    by_torch, exact = (dense(model, data, dtype) for dtype in (torch.float32, torch.float64))
    another = weights_mask(model, "few rows")
    tuned = ff.train_only(model, weights_mask(model), dense_gradient_limit=0)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(data).square().sum().backward()
    assert_all(model, by_torch, exact)
    # Another mask is another plan: the compiled model must follow.
    tuned.remask(another)
    compiled(data).square().sum().backward()
    assert_all(model, by_torch, exact)


def test_autocast_keeps_inputs_in_its_dtype_and_sums_in_fp32() -> None:
    model, data = built("deep")
    exact = dense(model, data, torch.float64)
    plain = copy.deepcopy(model)
    kept: list[torch.dtype] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = plain(data)
        out.float().square().sum().backward()
        ff.train_only(model, weights_mask(model), dense_gradient_limit=0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert same_bits(model(data), out)
        model(data).float().square().sum().backward()
    assert_all(model, {n: p.grad for n, p in plain.named_parameters()}, exact)
    # Of a layer: its input and what its own backward keeps; fp32 are the weights, for the latter's.
    assert kept.count(torch.bfloat16) >= 3


@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_plain_one(name: str) -> None:
    torch.manual_seed(0)
    make, x = CASES[name]
    layer = make()
    plain = copy.deepcopy(layer)
    tuned_layer(layer, "few")
    assert same_bits(layer(x), plain(x))
    assert same_bits(layer.state_dict()["weight"], plain.weight)  # max_norm changes it


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "gpt2"])
def test_no_grad_is_the_plain_forward(name: str) -> None:
    make, x = CASES[name]
    layer = make()
    with torch.no_grad():
        expected = layer(x)
        tuned_layer(layer, "few")
        out = layer(x)
    assert same_bits(out, expected)
    assert out.grad_fn is None
    assert same_bits(layer(x), expected)


@pytest.mark.parametrize("name", ["linear", "linear, no bias", "conv2d", "gpt2"])
def test_layer_keeps_its_input_only_for_masked_entries(name: str) -> None:
    """A frozen layer keeps no input; a masked one keeps it once and no weight in another form."""
    make, x = CASES[name]
    x = x.clone().requires_grad_()

    def kept(layer: nn.Module) -> list[int]:
        found: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            found.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        return found

    layer = make()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    frozen = kept(layer)
    tuned = tuned_layer(layer, "few")
    (values,) = tuned.parameters()
    weight = values.target.weight()
    plan = values.target.plan
    own = {t.data_ptr() for t in (weight, values, values.target.indices)}
    own |= {t.data_ptr() for t in (plan.rows, plan.columns, plan.positions) if t is not None}
    assert x.data_ptr() in kept(layer)
    assert set(kept(layer)) <= {x.data_ptr(), *own, *frozen}
    values.requires_grad_(False)
    assert kept(layer) == frozen


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickled, pickled_with_protocol_0, saved_by_torch]
)
@pytest.mark.parametrize("name", ["deep", "convs", "in place"])
def test_copy_has_its_own_plan(name: str, copied: Callable[[Any], Any]) -> None:
    model, data = built(name)
    by_torch, exact = (dense(model, data, dtype) for dtype in (torch.float32, torch.float64))
    ff.train_only(model, weights_mask(model, "few rows"), dense_gradient_limit=0)
    other = copied(model)
    other(data).square().sum().backward()
    assert_all(other, by_torch, exact)
    assert all(p.grad is None for p in model.parameters())


def test_another_mask_and_the_released_model() -> None:
    model, data = built("deep")
    by_torch, exact = (dense(model, data, dtype) for dtype in (torch.float32, torch.float64))
    another = weights_mask(model, "few columns")
    tuned = ff.train_only(model, weights_mask(model, "few"), dense_gradient_limit=0)
    model(data).square().sum().backward()
    tuned.remask(another)
    with tuned.released() as plain:
        assert type(plain[0]) is nn.Linear
        assert type(plain[2]) is Conv1D
        plain(data).square().sum().backward()
        assert same_bits(plain[0].weight.grad, by_torch["0.weight"])
        plain.zero_grad()
    model(data).square().sum().backward()
    assert_all(model, by_torch, exact)


@pytest.mark.gpu
def test_moving_a_layer_moves_its_plan() -> None:
    layer, x = nn.Linear(37, 29), numbers(5, 37)
    by_torch, exact = (dense(layer, x, dtype) for dtype in (torch.float32, torch.float64))
    (values,) = tuned_layer(layer, "few rows").parameters()
    for device in ("cpu", "cuda", "cpu"):
        layer.to(device).zero_grad()
        assert values.target.plan.device.type == device
        layer(x.to(device)).square().sum().backward()
        assert_gradient(
            values.grad.cpu(), values.target.indices.cpu(), by_torch["weight"], exact["weight"]
        )


def test_float64_layer() -> None:
    """The compiled kernel has no float64; the product in chunks does."""
    layer, x = nn.Linear(37, 29), numbers(5, 37)
    exact = dense(layer, x, torch.float64)
    (values,) = tuned_layer(layer, "few").parameters()
    layer.double()
    layer(x.double()).square().sum().backward()
    entries = values.target.indices.long()
    assert same_bits(values.grad, exact["weight"].flatten()[entries].float())


# --- who is on the road ---


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnConv(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.tanh(), bias)


class Renamed(nn.Linear):
    """A subclass that changes nothing."""


DENSE, OWN = "picked from the dense gradient", "products|sums"
WAYS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "own forward": (lambda: OwnForward(6, 5), X, DENSE),
    "own conv": (lambda: OwnConv(3, 4, 3), IMAGES, DENSE),
    "renamed": (lambda: Renamed(6, 5), X, OWN),
    "transposed conv": (lambda: nn.ConvTranspose2d(3, 4, 3), IMAGES, DENSE),
    "scale_grad_by_freq": (lambda: nn.Embedding(11, 6, scale_grad_by_freq=True), TOKENS, DENSE),
    "tied to attention": (TiedToAttention, X, f"{DENSE}; ({OWN})"),
    "tied": (TiedNet, TOKENS, f"({OWN}).*; sums over the batch's tokens"),
}


@pytest.mark.parametrize("name", WAYS)
def test_report_names_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data, way = WAYS[name]
    torch.manual_seed(0)
    model = make()
    by_torch, exact = (dense(model, data, dtype) for dtype in (torch.float32, torch.float64))
    tuned = ff.train_only(model, weights_mask(model), dense_gradient_limit=0)
    (line,) = [
        line for line in tuned.report().splitlines() if "float32" in line
        and ("attention.out_proj.weight" in line or name != "tied to attention")
    ]  # fmt: skip
    assert re.match(way, re.split("  +", line)[-1].strip())
    taps: list[int] = []
    apply = KeptTap.apply
    monkeypatch.setattr(KeptTap, "apply", lambda *args: taps.append(1) or apply(*args))
    model(data).square().sum().backward()
    assert bool(taps) == (DENSE in way)
    assert_all(model, by_torch, exact)


def test_option_that_leaves_the_road_is_seen_in_each_call() -> None:
    layer, plain = nn.Embedding(11, 6), nn.Embedding(11, 6, scale_grad_by_freq=True)
    tuned = tuned_layer(layer, "some")
    layer.scale_grad_by_freq = True
    assert tuned.report().endswith(DENSE)
    for module in (layer, plain):
        module(TOKENS).sum().backward()
    (values,) = tuned.parameters()
    assert same_bits(values.grad, plain.weight.grad.flatten()[tuned.mask["weight"].long()])


def test_wrapped_forward_is_recognised() -> None:
    """As accelerate's hooks wrap it: before the mask it is another's forward, after it is ours."""
    layer = nn.Linear(6, 5)
    found = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(found), found)
    assert tuned_layer(layer, "few").report().endswith(DENSE)
    layer(X).sum().backward()

    layer = nn.Linear(6, 5)
    tuned = tuned_layer(layer, "few")
    ours = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(ours), ours)
    assert not tuned.report().endswith(DENSE)
    layer(X).sum().backward()
    assert next(tuned.parameters()).grad.any()


# --- memory ---


@pytest.fixture
def peak_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import harness

    assert "bench" in str(sys.modules["harness"].__file__)
    return lambda run: harness.peak_bytes(run, torch.device("cpu"))


@pytest.mark.parametrize("style", ["few", "some"])
@pytest.mark.parametrize(
    ("make", "x", "dense_bytes"),
    [
        (lambda: nn.Linear(512, 1024), numbers(16, 512), 4 * 512 * 1024),
        (lambda: Conv1D(1024, 512), numbers(16, 512), 4 * 512 * 1024),
        (lambda: nn.Conv1d(256, 512, 4), numbers(2, 256, 6), 4 * 256 * 512 * 4),
        (lambda: nn.Embedding(8192, 64), TOKENS, 4 * 8192 * 64),
    ],
    ids=["linear", "gpt2", "conv", "embedding"],
)
def test_no_dense_gradient_lives(
    make: Callable[[], nn.Module],
    x: Tensor,
    dense_bytes: int,
    style: str,
    peak_bytes: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = 2**17
    monkeypatch.setattr(masked_grad_plan, "_SCRATCH_BYTES", {"cpu": scratch, "cuda": scratch})
    layer = make()
    plain = copy.deepcopy(layer)
    (values,) = tuned_layer(layer, style).parameters()
    peaks = []
    for module in (layer, plain):
        out = module(x)
        grad = cotangent(out)
        peaks.append(peak_bytes(lambda out=out, grad=grad: out.backward(grad)))
    k_bytes = values.numel() * 4
    # Per entry: its gradient, twice where it is added up, and for an embedding its row and column.
    allowed = 2 * scratch + 16 * out.numel() + 12 * k_bytes
    assert peaks[0] <= min(allowed, dense_bytes + k_bytes - 1), peaks
    if style == "few":
        assert peaks[0] < dense_bytes / 2
    assert peaks[1] >= dense_bytes
