"""An optimizer's state dict: masters in it, so that resuming equals not having stopped, and checks.

A bf16 or fp16 weight does not hold its fp32 master's bits, and the model's state dict has the base
model's keys only: the master travels as the entry ``"master"`` of the parameter's optimizer state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fishfast.training.gradient.tapped_module import CompactParameter

__all__ = ["add_masters", "own", "parameters_in_order", "refuse_other_shapes", "take_masters"]


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


def own(state: dict[str, Any], device_of_step: torch.device) -> None:
    """Copy what was loaded for a parameter, or a live optimizer's state would move with this one's.

    Args:
        state: changed in place.
        device_of_step: where the step count is read.
    """
    for name, value in state.items():
        if name == "step":  # a number in old states
            step = torch.as_tensor(value, dtype=torch.float32)
            state[name] = step.to(device_of_step, copy=True)
        elif isinstance(value, Tensor):  # torch's has its parameter's strides
            state[name] = value.clone(memory_format=torch.contiguous_format)


def refuse_other_shapes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse state that is not as long as its parameter, as the compiled step trusts that it is.

    Raises:
        ValueError: names the state and both shapes.
    """
    saved = (index for group in state_dict["param_groups"] for index in group["params"])
    for index, parameter in zip(saved, parameters_in_order(optimizer), strict=False):
        for name, value in state_dict["state"].get(index, {}).items():
            if name != "step" and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"state_dict must fit the parameters; got {name!r} of shape "
                    f"{tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}; "
                    "was it saved with another mask?"
                )
