"""Param groups by what the weights are: a compact parameter is a vector, whatever its weight is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fishfast.mask.names import match_names
from fishfast.training.values.masters import CompactParameter
from fishfast.training.values.retired import VALUES_SUFFIX

__all__ = ["make_param_groups"]


def make_param_groups(
    named: Iterator[tuple[str, CompactParameter]],
    weight_decay: float,
    no_decay: str | Iterable[str],
    head_lr: float | None,
    head: str | Iterable[str] | None,
) -> list[dict[str, Any]]:
    """Do what `fishfast.SparseTuning.param_groups` says."""
    for argument, value in (("weight_decay", weight_decay), ("head_lr", head_lr)):
        if value is not None and not value >= 0:
            raise ValueError(f"{argument} must be at least 0; got {value!r}")
    if head is not None and head_lr is None:
        raise ValueError(f"head goes with head_lr; got head={head!r} alone; pass its learning rate")
    values = {name.removesuffix(VALUES_SUFFIX): parameter for name, parameter in named}
    spared = set(match_names(no_decay, list(values), "no_decay"))
    if head is not None:
        heads = set(match_names(head, list(values), "head"))
    else:
        heads = {name for name, p in values.items() if len(p) == p.target.shape.numel()}
    if head_lr is not None and not heads:
        raise ValueError(
            "head_lr needs weights that are masked whole, such as a kept head; the mask has none; "
            "name them with head="
        )
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in values.items():
        decays = name not in spared and len(parameter.target.shape) >= 2
        in_head = head_lr is not None and name in heads
        own_lr = {"lr": head_lr} if in_head else {}
        empty: dict[str, Any] = {
            "params": [],
            "weight_decay": weight_decay if decays else 0.0,
            **own_lr,
        }
        groups.setdefault((in_head, not decays), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
