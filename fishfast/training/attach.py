"""`SparseTuning.attach`: any torch optimizer over compact parameters writes into the weights."""

from __future__ import annotations

import torch
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from fishfast.training.gradient.tapped_module import CompactParameter, refuse_retired
from fishfast.training.optimizer_state import add_masters, parameters_in_order, take_masters
from fishfast.training.state import TuningState

__all__ = ["Attachment", "attach"]


class Attachment:
    """What `SparseTuning.attach` added to an optimizer."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take it off again."""
        for handle in self._handles:
            handle.remove()


def attach(tuned: TuningState, optimizer: Optimizer) -> Attachment:
    """Do what `SparseTuning.attach` says."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer; got {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "optimizer must update once per step; got LBFGS, which evaluates the model several "
            "times before its values reach the weights"
        )
    mask, own = tuned.mask, {id(parameter) for parameter in tuned.parameters()}

    def held() -> list[CompactParameter]:
        nonlocal mask, own
        if mask is not tuned.mask:
            mask, own = tuned.mask, {id(parameter) for parameter in tuned.parameters()}
        return [p for p in parameters_in_order(optimizer) if id(p) in own]  # type: ignore[misc]

    if not held():
        raise ValueError(
            "optimizer must hold compact parameters of this model; got none of them; make it "
            "with tuned.parameters()"
        )

    def follow(*_: object) -> None:
        refuse_retired(parameters_in_order(optimizer))
        for parameter in held():
            parameter.follow_()

    def write_back(*_: object) -> None:
        for parameter in held():
            parameter.write_()

    take_masters(optimizer)  # of a state that was loaded before
    disable = torch.compiler.disable  # a compiled training step breaks here, and goes on
    return Attachment(
        optimizer.register_step_pre_hook(disable(follow)),
        optimizer.register_step_post_hook(disable(write_back)),
        optimizer.register_state_dict_post_hook(add_masters),
        optimizer.register_load_state_dict_post_hook(take_masters),
    )
