"""Where a mask's values live in a model, and whether they can be trained there."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fishfast.mask.sparse_mask import SparseMask
from fishfast.training.gradient.tapped_module import (
    VALUES_SUFFIX,
    CompactParameter,
    compact_parameters,
)
from fishfast.training.values.target import Target

__all__ = [
    "find_targets",
    "refuse_later_ties",
    "refuse_outside_owners",
    "selected_values",
    "targets_of",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def find_targets(model: nn.Module, mask: SparseMask) -> list[Target]:
    """Find the owners of every masked weight and check that it can be trained; change nothing.

    Args:
        model: plain or tuned.
        mask: one that fits it.

    Returns:
        A target for every parameter with selected weights, in the mask's order.

    Raises:
        ValueError: a weight whose dtype or memory cannot be trained so, or that is a compact
            parameter itself, or whose module uses the compact parameter's name for something else.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own_name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, own_name))
    parameters = dict(model.named_parameters())
    targets = []
    for name, indices in mask.items():
        weight = parameters[name]
        if isinstance(weight, CompactParameter):
            raise ValueError(
                f"mask must name the model's own weights; {name!r} holds the trained values of "
                "one; score the plain model: with tuned.released() as model"
            )
        if len(indices) == 0:
            continue
        _check_weight(name, weight)
        for module, own_name in owners[id(weight)]:
            beside = getattr(module, own_name + VALUES_SUFFIX, None)
            if beside is not None and not isinstance(beside, CompactParameter):
                raise ValueError(
                    f"model must not have an attribute {own_name + VALUES_SUFFIX!r} beside {name!r}"
                )
        targets.append(Target(owners[id(weight)], indices.to(weight.device), name))
    return targets


def _check_weight(name: str, weight: Tensor) -> None:
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"masked weights must be float32, bfloat16 or float16; got {weight.dtype} for "
            f"{name!r}; masters are fp32 and could not hold it"
        )
    if weight.is_inference():
        raise ValueError(
            f"masked weights must not be made in inference mode; {name!r} was; clone the model"
        )
    if weight.device.type == "meta":
        raise ValueError(f"masked weights must have memory; {name!r} is on the meta device")
    strides = sorted(
        (stride, n) for stride, n in zip(weight.stride(), weight.shape, strict=True) if n > 1
    )
    for (stride, n), (larger, _) in zip(strides, strides[1:], strict=False):
        if stride * n > larger:
            raise ValueError(f"masked weights must not overlap in memory; {name!r} does")
    if strides and strides[0][0] == 0:
        raise ValueError(f"masked weights must not be expanded; {name!r} has stride 0")


def refuse_later_ties(model: nn.Module) -> None:
    """Refuse masked weights that further modules hold now: their gradients do not arrive.

    Args:
        model: tuned.

    Raises:
        RuntimeError: names the weight and a module that got it after `train_only`.
    """
    masked = {
        id(parameter.target.weight()): parameter.target
        for _, parameter in compact_parameters(model)
    }
    for prefix, module in model.named_modules():
        for own_name, parameter in module._parameters.items():
            target = masked.get(id(parameter))
            if target is None or any(
                module is owner and own_name == name for owner, name in target.owners
            ):
                continue
            later = f"{prefix}.{own_name}".removeprefix(".")
            raise RuntimeError(
                f"weights must be tied before train_only; {later!r} was tied to {target.name!r} "
                "after it, and its part of the gradient is missing; release(), tie them and call "
                "train_only again"
            )


def refuse_outside_owners(model: nn.Module, targets: list[Target]) -> None:
    """Refuse masked weights that a module outside of the model holds, too.

    Its part of the gradient would not arrive: such is the head of a language model that is tied to
    the embedding, where only the model below the head is passed. Python's garbage collector knows
    who holds a weight.

    Args:
        model: what is tuned.
        targets: of its mask.

    Raises:
        ValueError: names the weight and the class of the other module.
    """
    targets = [target for target in targets if _has_other_holders(target)]
    if not targets or any(isinstance(module, GraphModule) for module in model.modules()):
        return  # what torch.fx traced shares its weights with the model it was traced from
    weights = {id(target.weight()): target for target in targets}
    inside = {id(module._parameters) for module in model.modules()}
    outside = {
        id(holder): holder
        for holder in gc.get_referrers(*(target.weight() for target in targets))
        if type(holder) is dict and id(holder) not in inside
    }
    for module in _modules_with(outside):
        # What torch.fx traced holds weights in bare modules, and trains nothing by itself.
        found = [weights[id(p)] for p in module._parameters.values() if id(p) in weights]
        if found and type(module) is not nn.Module:
            raise ValueError(
                f"model must hold every use of its masked weights; {found[0].name!r} is also in a "
                f"{type(module).__name__} outside of it, whose part of the gradient would be "
                "missing; pass the whole model with a mask of its names, or clone the weight"
            )


def _has_other_holders(target: Target) -> bool:
    """Return whether more than its owners refer to a weight; to find out who takes a second."""
    weight = target.weight()
    return sys.getrefcount(weight) > len(target.owners) + 2  # the name and the call's argument


def _modules_with(parameters: dict[int, dict[str, Any]]) -> Iterator[nn.Module]:
    """Yield modules that have one of these dicts as their ``_parameters``."""
    if not parameters:
        return
    holders = gc.get_referrers(*parameters.values())  # the modules, or their attributes' dicts
    attributes = [h for h in holders if type(h) is dict and id(h.get("_parameters")) in parameters]
    for module in [*holders, *(gc.get_referrers(*attributes) if attributes else [])]:
        if isinstance(module, nn.Module) and id(module._parameters) in parameters:
            yield module


def targets_of(model: nn.Module, mask: SparseMask) -> dict[str, Target]:
    """Return the place of every parameter that has selected weights, by name.

    Args:
        model: plain or tuned.
        mask: one that fits it.
    """
    parameters = dict(model.named_parameters())
    targets = {}
    for name, found in mask.items():
        if len(found):
            module_name, _, own_name = name.rpartition(".")
            owner = (model.get_submodule(module_name), own_name)
            targets[name] = Target([owner], found.to(parameters[name].device), name)
    return targets


def selected_values(model: nn.Module, mask: SparseMask) -> dict[str, Tensor]:
    """Return the selected weights of every parameter that has any, on the CPU."""
    return {
        name: weight.detach().flatten()[mask[name].to(weight.device).long()].cpu()
        for name, weight in model.named_parameters()
        if len(mask.get(name, ()))
    }
