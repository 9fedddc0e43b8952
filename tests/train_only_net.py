"""A small net of many parts under a mask, and what must hold for it at any time."""

from __future__ import annotations

import torch
from stepping import mask_of, same_bits
from torch import Tensor, nn
from train_only_modules import mask_over_all, numbers

import fishfast as ff


class Net(nn.Module):
    """A little of everything: conv, norm with buffers, a layer that is tied, one without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 6)
        self.again = nn.Linear(4, 6)
        self.again.weight = self.first.weight
        self.free = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).mean((2, 3))
        return self.free(self.first(x).tanh() + self.again(x))


def net() -> nn.Module:
    torch.manual_seed(1)
    return Net()


def net_mask(model: nn.Module) -> ff.SparseMask:
    whole = mask_over_all(model)
    return mask_of(model, {n: found for n, found in whole.items() if not n.startswith("free")})


def tuned_net() -> ff.SparseTuning:
    model = net()
    return ff.train_only(model, net_mask(model))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        model(numbers(5, 3, 6, 6, seed=seed).to(dtype)).float().square().sum().backward()
        optimizer.step()


def compact(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if n.endswith("_values")]


def assert_masters_match(model: nn.Module) -> None:
    for parameter in compact(model):
        assert parameter.dtype == torch.float32
        weights = parameter.target.gather()
        assert same_bits(parameter.detach().to(weights.dtype), weights)
