"""A small net with everything that a delta holds, masked and trained."""

from __future__ import annotations

import torch
from stepping import mask_of, some_indices
from torch import Tensor, nn

import fishfast as ff


class Net(nn.Module):
    """Conv, norm with buffers, a tied pair, and a head that is fresh in every process."""

    def __init__(self, head_seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 6)
        self.again = nn.Linear(4, 6)
        self.again.weight = self.first.weight
        torch.manual_seed(head_seed)
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).mean((2, 3))
        return self.head(self.first(x).tanh() + self.again(x))


def images(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_with_head(model: nn.Module, seed: int = 0) -> ff.SparseMask:
    """Return a mask with some entries of every parameter and all of the head."""
    return mask_of(
        model,
        {
            name: torch.arange(p.numel())
            if name.startswith("head")
            else some_indices(p.numel(), seed=seed)
            for name, p in model.named_parameters()
        },
    )


def train(tuned: ff.SparseTuning, steps: int = 3) -> None:
    optimizer = ff.AdamW(tuned.parameters(), lr=0.05)
    for seed in range(steps):
        optimizer.zero_grad()
        dtype = next(iter(tuned.model.parameters())).dtype
        tuned.model(images(seed, dtype)).float().square().sum().backward()
        optimizer.step()


def trained(dtype: torch.dtype = torch.float32) -> ff.SparseTuning:
    model = Net().to(dtype)
    tuned = ff.train_only(model, mask_with_head(model))
    train(tuned)
    return tuned
