"""Checkpoints for tests, and what is compared of them."""

from __future__ import annotations

from pathlib import Path

import torch
from delta_net import Net, mask_with_head
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def checkpoint_of(model: nn.Module, *aliases: str) -> Tensors:
    """What a checkpoint has: a tied weight once, under its first name unless named here."""
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    dropped = {"again.weight": "first.weight"}
    for name, first in dropped.items():
        if name in state:
            del state[first if name in aliases else name]
    return state


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same_file(path: Path, expected: Tensors) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert raw(found[name]) == raw(tensor), name


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def unmasked(base: Tensors) -> None:
    masked = set(mask_with_head(Net())["conv.weight"].tolist())
    index = next(i for i in range(108) if i not in masked)
    base["conv.weight"].view(-1)[index] *= 1.0001
