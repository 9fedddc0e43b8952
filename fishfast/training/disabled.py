"""The base model for a moment: its k values are written in, and the trained ones back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from fishfast.training.state import TuningState
from fishfast.training.targets import targets_of
from fishfast.training.values.sync import follow
from fishfast.training.values.target import Target

__all__ = ["base_model"]


@contextlib.contextmanager
def base_model(tuned: TuningState) -> Iterator[nn.Module]:
    """Do what `fishfast.SparseTuning.disabled` says."""
    held = [p for p in tuned.parameters() if p.requires_grad]
    if not list(tuned.parameters()):
        raise RuntimeError("the model is released: it has no trained values to put aside")
    if any(p.target.disabled for p in tuned.parameters()):
        raise RuntimeError("the model is the base already: this is within tuned.disabled()")
    for parameter in tuned.parameters():
        follow(parameter)
    versions = [p.plain._version for p in tuned.parameters()]
    targets = targets_of(tuned.model, tuned.trained_mask)  # all that any mask so far has trained
    trained = {name: target.gather() for name, target in targets.items()}
    hooks = [parameter.register_hook(_refuse_backward) for parameter in held]
    try:
        for parameter in tuned.parameters():
            parameter.target.disabled = True
            parameter.requires_grad_(False)
        for name, target in targets.items():
            _write_unseen(target, tuned.base_values[name])
        yield tuned.model
    finally:
        for hook in hooks:
            hook.remove()
        for name, target in targets.items():
            _write_unseen(target, trained[name])
        for parameter, version in zip(tuned.parameters(), versions, strict=True):
            parameter.target.disabled = False
            if parameter.plain._version != version:  # written to meanwhile: the weight follows
                parameter.unsettle()
        for parameter in held:
            parameter.requires_grad_(True)


def _refuse_backward(grad: Tensor) -> None:
    raise RuntimeError(
        "backward() of the trained model cannot run within tuned.disabled(): its weights have the "
        "base's values there; call it after the block"
    )


def _write_unseen(target: Target, values: Tensor) -> None:
    """Write into the weight without counting a version.

    A forward of the trained model that waits for its backward has saved the weight, and gets it
    back bit for bit before that.
    """
    weight = target.weight().data
    flat = weight.as_strided((target.extent(weight),), (1,))
    where = target.offsets(weight).long()
    flat.index_copy_(0, where, values.to(weight.device, weight.dtype))
