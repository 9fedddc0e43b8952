"""An optimizer's state dict: masters and the mask's name in it.

A bf16 or fp16 weight does not hold its fp32 master's bits, and the model's state dict has the base
model's keys only. So the master travels as the entry ``"master"`` of the parameter's state, and
resuming equals not having stopped. Each param group names the mask of its parameters: a number of
each, made from the indices, under ``"mask_fingerprints"``. The state of another mask is refused,
whatever its sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fishfast.training.values import sync
from fishfast.training.values.masters import CompactParameter
from fishfast.training.values.sync import held_by

__all__ = [
    "MASTER",
    "add_masters",
    "keep_masters",
    "own",
    "parameters_in_order",
    "refuse_other_mask",
    "take_masters",
]

MASTER, _MASKS = "master", "mask_fingerprints"


def parameters_in_order(optimizer: Optimizer) -> list[Tensor]:
    """Return the optimizer's parameters in the order of its state dict's indices."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _needs_master(values: CompactParameter) -> bool:
    return values.target.weight().dtype != torch.float32


def keep_masters(optimizer: Optimizer, *_: Any) -> None:
    """Give the state of stepped parameters the entry, after a step.

    Checkpoints of torch.distributed load what the live state has, by name.
    """
    for values in held_by(optimizer):
        values.from_state = None
        if values.grad is not None and _needs_master(values):
            # The parameter itself, which no write, move or copy leaves behind.
            optimizer.state[values][MASTER] = values


def add_masters(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Add the masters of weights that hold fewer bits, and the mask's name, to a state dict.

    Args:
        optimizer: what the state dict is of.
        state_dict: changed in place.
    """
    for index, parameter in enumerate(parameters_in_order(optimizer)):
        if not isinstance(parameter, CompactParameter) or not _needs_master(parameter):
            continue
        # A master alone would be half a state to torch, so an untrained one is left out.
        entry = state_dict["state"].get(index, {})
        if entry or not torch.equal(parameter.detach(), parameter.target.gather().float()):
            # A copy: torch.distributed loads into the very tensors of a state dict, and then loads
            # the model, which takes the masters from its weights.
            state_dict["state"][index] = {**entry, MASTER: parameter.detach().clone()}
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        if any(isinstance(p, CompactParameter) for p in group["params"]):
            saved[_MASKS] = [_fingerprint(p) for p in group["params"]]


def _fingerprint(parameter: Tensor) -> int:
    return parameter.target.fingerprint if isinstance(parameter, CompactParameter) else 0


def take_masters(optimizer: Optimizer) -> None:
    """Move loaded masters from the state to the parameters, where they round to the weights."""
    for group in optimizer.param_groups:
        group.pop(_MASKS, None)
    for values in held_by(optimizer):
        state = optimizer.state.get(values, {})
        master = state.pop(MASTER, None)
        if master is not None:
            if master is not values:  # as `keep_masters` left it
                sync.take_masters(values, master)
            if _needs_master(values):
                state[MASTER] = values


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


def refuse_other_mask(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse the state of another mask; the compiled step trusts that state fits its parameter.

    Args:
        optimizer: what it is loaded into.
        state_dict: names its mask, unless it is torch's own or of an older fishfast.

    Raises:
        ValueError: names the weight, and the state and both shapes where they differ.
    """
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for parameter, mask in zip(group["params"], saved.get(_MASKS, ()), strict=False):
            if isinstance(parameter, CompactParameter) and mask != _fingerprint(parameter):
                raise ValueError(
                    "state_dict must be of the model's present mask; got that of another one for "
                    f"{parameter.target.name!r}; train with the mask that it was saved with "
                    "(SparseMask.save and load keep it), or start with a new optimizer"
                )
    indices = (index for group in state_dict["param_groups"] for index in group["params"])
    for index, parameter in zip(indices, parameters_in_order(optimizer), strict=False):
        for name, value in state_dict["state"].get(index, {}).items():
            if name != "step" and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"state_dict must fit the parameters; got {name!r} of shape "
                    f"{tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}; "
                    "was it saved with another mask?"
                )
