"""`SparseTuning.attach`: masters and mask in the state dict of any torch optimizer.

That the weights follow its steps needs no attachment: `fishfast.training.values.sync` sees to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fishfast.training.optimizer_state import (
    add_masters,
    keep_masters,
    refuse_other_mask,
    take_masters,
)
from fishfast.training.state import TuningState
from fishfast.training.values.sync import held_by

__all__ = ["Attachment", "attach"]


class Attachment:
    """What `SparseTuning.attach` added to an optimizer."""

    def __init__(self, *removals: Callable[[], None]) -> None:
        self._removals = removals

    def remove(self) -> None:
        """Take it off again."""
        for removal in self._removals:
            removal()


def attach(tuned: TuningState, optimizer: Any) -> Attachment:
    """Do what `SparseTuning.attach` says."""
    inner = _innermost(optimizer)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer; got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in tuned.parameters()}
    if not any(id(parameter) in own for parameter in held_by(inner)):
        raise ValueError(
            "optimizer must hold compact parameters of this model; got none of them; make it "
            "with tuned.parameters()"
        )
    take_masters(inner)  # of a state that was loaded before
    disable = torch.compiler.disable  # a compiled training step breaks here, and goes on
    handles: list[RemovableHandle] = [
        inner.register_step_post_hook(disable(keep_masters)),
        inner.register_state_dict_post_hook(add_masters),
        inner.register_load_state_dict_pre_hook(refuse_other_mask),
        inner.register_load_state_dict_post_hook(take_masters),
    ]
    removals: list[Callable[[], None]] = [handle.remove for handle in handles]
    if type(inner).load_state_dict is not Optimizer.load_state_dict:
        removals.append(_call_after_loading(inner))
    return Attachment(*removals)


def _innermost(optimizer: Any) -> Any:
    """Return what a wrapper wraps, such as Accelerate's ``AcceleratedOptimizer`` or a Lookahead."""
    while not isinstance(optimizer, Optimizer) or isinstance(
        getattr(optimizer, "optimizer", None), Optimizer
    ):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    return optimizer


def _call_after_loading(optimizer: Optimizer) -> Callable[[], None]:
    """Take masters after a ``load_state_dict`` of its own, which may call no hooks.

    bitsandbytes' optimizers have one.

    Returns:
        What undoes this.
    """
    load = optimizer.load_state_dict

    @functools.wraps(load)
    def load_and_take(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        refuse_other_mask(optimizer, state_dict)
        load(state_dict, *args, **kwargs)
        take_masters(optimizer)

    optimizer.load_state_dict = load_and_take  # type: ignore[method-assign]
    return lambda: vars(optimizer).pop("load_state_dict", None)
