"""Models with masked layers, and their gradients by torch and exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from masked_grad_cases import assert_gradient, masked_entries
from stepping import mask_of
from torch import Tensor, nn
from train_only_modules import TOKENS, CalledTwice, Checkpointed, TiedNet, numbers
from transformers.pytorch_utils import Conv1D

import fishfast as ff

X = numbers(4, 7, 6)
IMAGES = numbers(2, 3, 8, 8)


def weights_mask(model: nn.Module, style: str = "few") -> ff.SparseMask:
    """Return a mask over the weights of layers, of a plain model; biases have none."""
    shapes = {n: p.shape for n, p in model.named_parameters() if p.dim() > 1}
    return mask_of(model, {name: masked_entries(shape, style) for name, shape in shapes.items()})


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), Conv1D(8, 9), nn.Tanh(), nn.Linear(8, 5))


def convs() -> nn.Module:
    first = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2, groups=2))


def smooth_convs() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1, groups=2))


def frozen_between() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU(inplace=True))


class InPlace(nn.Module):
    """Writes into the outputs of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mul_(2)
        return self.second(self.first(x).relu_()).sigmoid_()


class TiedToAttention(nn.Module):
    """A weight that a layer's call and attention, which reads it, both use."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.layer = nn.Linear(6, 6)
        self.layer.weight = self.attention.out_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.attention(x, x, x)[0])


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "deep": (deep, X),
    "convs": (convs, IMAGES),
    "convs smooth": (smooth_convs, IMAGES),
    "frozen between": (frozen_between, X),
    "in place": (InPlace, TOKENS),
    "tied": (TiedNet, TOKENS),
    "tied to attention": (TiedToAttention, X),
    "called twice": (CalledTwice, X),
    "checkpoint, reentrant": (lambda: Checkpointed(True), X),
    "checkpoint": (lambda: Checkpointed(False), X),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, data = MODELS[name]
    return make(), data


def as_dtype(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.to(dtype) if data.is_floating_point() else data


def dense(model: nn.Module, data: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(dtype)
    model(as_dtype(data, dtype)).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_all(model: nn.Module, by_torch: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    compared = 0
    for name, p in model.named_parameters():
        if not name.endswith("_values"):
            assert p.grad is None
            continue
        name = name.removesuffix("_values")
        assert_gradient(p.grad, p.target.indices, by_torch[name], exact[name])
        compared += bool(p.grad.any())
    assert compared
