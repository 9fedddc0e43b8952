"""Masters in an optimizer's state dict, so that resuming equals not having stopped.

A bf16 or fp16 weight does not hold its fp32 master's bits, and the model's state dict has the base
model's keys only: the master travels as the entry ``"master"`` of the parameter's optimizer state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fishfast.compact import CompactParameter

__all__ = ["add_masters", "parameters_in_order", "take_masters"]


def parameters_in_order(optimizer: Optimizer) -> list[Tensor]:
    """Return the optimizer's parameters in the order of its state dict's indices."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def add_masters(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Add the masters of weights that hold fewer bits to a state dict, in place."""
    for index, parameter in enumerate(parameters_in_order(optimizer)):
        if not isinstance(parameter, CompactParameter):
            continue
        if parameter.target.weight().dtype == torch.float32:
            continue
        # A master alone would be half a state to torch, so an untrained one is left out.
        entry = state_dict["state"].get(index, {})
        if entry or not torch.equal(parameter.detach(), parameter.target.gather().float()):
            state_dict["state"][index] = {**entry, "master": parameter.detach()}


def take_masters(optimizer: Optimizer) -> None:
    """Move loaded masters from the state to the parameters, where they round to the weights."""
    for parameter in parameters_in_order(optimizer):
        state = optimizer.state.get(parameter, {})
        master = state.pop("master", None)
        if master is not None and isinstance(parameter, CompactParameter):
            with torch.no_grad():
                parameter.copy_(master)
            parameter.refresh_()
