"""Two equal models under two equal optimizers: one keeps its steps, the other checks each in full.

Whatever is done to both, they must agree in every bit: that is what a kept step promises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stepping import same_bits
from torch import Tensor, nn

import fishfast as ff
from fishfast.optim.base import SparseOptimizer
from fishfast.optim.kept_step import KeptStep
from fishfast.training.values.sync import refuse_unwritten

__all__ = ["MAKERS", "Twin", "assert_equal", "both", "counted_steps", "step_both", "twins"]

MAKERS = {
    "AdamW": lambda p: ff.AdamW(p, lr=1e-2, weight_decay=0.1),
    "Adam, amsgrad, L2": lambda p: ff.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "SGD": lambda p: ff.SGD(p, lr=1e-2),
    "SGD, momentum": lambda p: ff.SGD(p, lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.1),
}


class Net(nn.Module):
    """A square weight, one that is tied, one in channels_last, one in bf16, and a plain bias."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(6, 6)
        self.tied, self.again = nn.Linear(5, 3), nn.Linear(5, 3)
        self.again.weight = self.tied.weight
        self.conv = nn.Conv2d(4, 5, 3)
        self.conv.weight.data = self.conv.weight.data.to(memory_format=torch.channels_last)
        self.low = nn.Linear(7, 4).bfloat16()


class Twin:
    """A model, its tuning and an optimizer over all that trains."""

    def __init__(self, make: Callable[[Any], SparseOptimizer]) -> None:
        torch.manual_seed(0)
        self.model = Net()
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        indices = {
            name: torch.arange(0, p.numel(), 3).int()
            for name, p in self.model.named_parameters()
            if p.dim() > 1
        }
        self.tuned = ff.train_only(self.model, ff.SparseMask(indices, shapes))
        self.model.square.bias.requires_grad_(True)
        self.optimizer = make([*self.tuned.parameters(), self.model.square.bias])

    def parameters(self) -> list[Tensor]:
        """What the optimizer holds."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def compact(self, name: str) -> Any:
        """The compact parameter of a weight."""
        return dict(self.model.named_parameters())[name + "_values"]

    def weight(self, name: str) -> Tensor:
        """A weight as its module holds it, without the tap."""
        module, _, own = name.rpartition(".")
        found = self.model.get_submodule(module)._parameters[own]
        assert found is not None
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that a step may write."""
        found = dict(self.model.named_parameters())
        for position, parameter in enumerate(self.parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and name != "master":  # the values
                    found[f"{position}.{name}"] = value
        return found


def twins(make: Callable[[Any], SparseOptimizer], steps: int = 3) -> tuple[Twin, Twin]:
    """Return both, after some steps."""
    pair = Twin(make), Twin(make)
    step_both(pair, steps)
    return pair


def both(pair: tuple[Twin, Twin], change: Callable[[Twin], object]) -> None:
    """Do the same to both, with the same random numbers."""
    for twin in pair:
        torch.manual_seed(7)
        with torch.no_grad():
            change(twin)


def step_both(
    pair: tuple[Twin, Twin],
    steps: int = 3,
    prepare: Callable[[Twin], object] = lambda twin: None,
) -> None:
    """Step both on the same random gradients; the second one checks each step in full."""
    for seed in range(steps):
        for position, twin in enumerate(pair):
            torch.manual_seed(seed)
            for parameter in twin.parameters():
                parameter.grad = torch.randn_like(parameter.detach())
            prepare(twin)
            if position == 1:
                twin.optimizer._kept = None
            twin.optimizer.step()
        assert_equal(pair)


def assert_equal(pair: tuple[Twin, Twin]) -> None:
    """Everything that a step may write has the same bits in both, and values are in weights."""
    a, b = (twin.tensors() for twin in pair)
    assert a.keys() == b.keys()
    different = [name for name in a if not same_bits(a[name].detach(), b[name].detach())]
    assert different == []
    for parameter in pair[0].parameters():
        if hasattr(parameter, "target"):
            refuse_unwritten(parameter, "values")
            assert not parameter.target.changed(parameter.target.weight())
            assert parameter.plain._version == parameter.agreed


@contextlib.contextmanager
def counted_steps() -> Iterator[dict[str, int]]:
    """Count steps that were checked in full and steps that were taken as kept."""
    count = {"checked": 0, "kept": 0}
    checked, take = SparseOptimizer._checked_step, KeptStep.take

    def counted_checked(self: Any, *args: Any) -> Any:
        count["checked"] += 1
        return checked(self, *args)

    def counted_take(self: Any, *args: Any) -> bool:
        taken = take(self, *args)
        count["kept"] += taken
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseOptimizer, "_checked_step", counted_checked)
        patch.setattr(KeptStep, "take", counted_take)
        yield count
