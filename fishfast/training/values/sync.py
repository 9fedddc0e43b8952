"""The one file that decides who wrote last: the masters or their weight.

The k trained values of a weight are in memory twice: as fp32 masters (a `CompactParameter`), and
rounded in the weight that the model computes with. The masters are the truth and the weight
follows, but either may be written to from outside. What moved tells by whom:

==================================  =======================  =======================================
who wrote                           what moved               what becomes of it
==================================  =======================  =======================================
fishfast's own step                 both versions            its kernel wrote both
any other optimizer's step          maybe nothing (fused,    before it, weights written from outside
                                    a collective after it)   are taken; after it, all are written
a step that raised half-way         maybe nothing            unsettled: the next read writes masters
masters: an EMA swap, a clamp       the masters' version     the next read writes them
masters: a collective               nothing                  unsettled by what torch asks before it
                                                             (``is_complex``, ``.data``)
the weight: ``nn.init``, an EMA     the weight's version     the next read, step or save takes over
                                                             entries that no master rounds to
the weight, replaced                identity, address or     the same
                                    strides
DDP's first broadcast               both versions, no bit    nothing: bits are compared
both, one after the other           both versions            the masters, if the weight has the bits
                                                             of the last load (`Target.has_bits`);
                                                             else the weight
``model.load_state_dict``           -                        `take_weights`: as they are
``optimizer.load_state_dict``       -                        its masters, if they round to weights
                                                             of now or of a model loaded next
a copy, an unpickled one            versions start anew      they agree
``weight.data.copy_(...)``, numpy,  nothing                  no step sees it; `tuned.rebase()` does,
a collective into the weight                                 and a save refuses what is left
==================================  =======================  =======================================

Writing only when the weight is next read would be less work, and wrong: compiled code, held
references and exports read it without asking. Writing after each backward would break schedules
that keep a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fishfast.training.values.masters import CompactParameter
from fishfast.training.values.retired import refuse_retired
from fishfast.training.values.write_values import write_values

__all__ = [
    "follow",
    "held_by",
    "refuse_unwritten",
    "settle",
    "take_changes",
    "take_masters",
    "take_weights",
    "watch_optimizers",
    "write",
]


def settle(values: Any) -> None:
    """Before a weight is read: make it and its values agree, as far as that raises nothing.

    Code under torch.compile passes by: a write is no part of the graph that it traces.

    Args:
        values: a compact parameter; anything else, such as what torch.func puts in its place, has
            no weight.
    """
    if type(values) is not CompactParameter or is_dynamo_compiling():
        return
    target, written = values.target, values.is_written
    # A copy that nothing wrote to agrees with its weight, though it has not seen it yet.
    if (written or (target.has_seen and not target.agrees())) and target.is_present():
        follow(values)


def follow(values: CompactParameter) -> None:
    """Make values and weight agree after either was written to, or the weight replaced.

    Args:
        values: changed in place, or its weight is.
    """
    target, weight = values.target, values.target.weight()
    written = values.is_written
    if not target.changed(weight):
        if written:
            write([values])
    # A copy has not seen its weight yet, which agreed with the values when it was made.
    elif written and (not target.has_seen or target.has_bits()):
        write([values])
    else:
        take_changes(values)


def take_changes(values: CompactParameter) -> None:
    """Take over entries of the weight that the masters do not round to; others keep their bits.

    Args:
        values: changed in place.
    """
    with torch.no_grad():
        weights = values.target.gather()
        agree = values.detach().to(weights.dtype) == weights
        values.copy_(torch.where(agree, values, weights.float()))
    _agree(values)


def take_weights(values: CompactParameter) -> None:
    """Take the weight as it is, whatever the masters were: of a state that was loaded.

    Masters that an optimizer's state brought just before are kept where they round to it.

    Args:
        values: changed in place.
    """
    if not values.is_written and values.target.has_bits():
        return  # a tied weight, loaded a second time under its other name
    loaded, values.from_state = values.from_state, None
    with torch.no_grad():
        values.copy_(values.target.gather() if loaded is None else loaded)
    if loaded is not None:
        take_changes(values)
    _agree(values)


def take_masters(values: CompactParameter, masters: Tensor) -> None:
    """Take masters of an optimizer's state where they round to the weight.

    Args:
        values: changed in place.
        masters: fp32 [k].
    """
    follow(values)  # what was written into them before is no leftover of the weight
    with torch.no_grad():
        values.copy_(masters)
    take_changes(values)
    values.from_state = masters


def _agree(values: CompactParameter) -> None:
    values.target.mark_seen(values.target.weight(), with_bits=True)
    values.mark_written()


def write(values: Iterable[CompactParameter]) -> None:
    """Write values into their weights, all in one launch for each device.

    Args:
        values: compact parameters.
    """
    written = list(values)
    for one in written:
        one.plain = one.detach()  # ``set_`` gives it other memory
    write_values([(one.plain, one.target) for one in written])
    for one in written:
        one.mark_written()


def refuse_unwritten(values: CompactParameter, name: str) -> None:
    """Refuse values that are not in the weight, though `follow` was called.

    Args:
        values: a compact parameter.
        name: what the error calls them.

    Raises:
        RuntimeError: values or weight were written to and no version counts it.
    """
    weights = values.target.gather()
    if not torch.equal(values.detach().to(weights.dtype), weights):
        raise RuntimeError(
            f"the values of {name!r} were not written into the weights: something wrote to "
            "either past autograd, such as through weight.data or numpy; write in no_grad mode"
        )


def held_by(optimizer: Optimizer) -> list[CompactParameter]:
    """Return the compact parameters in an optimizer's groups.

    Args:
        optimizer: any torch optimizer.
    """
    groups: list[dict[str, list[Tensor]]] = optimizer.param_groups
    return [p for group in groups for p in group["params"] if isinstance(p, CompactParameter)]


def _take_over(optimizer: Optimizer) -> None:
    """Take over weights that were written from outside, before another optimizer's step."""
    held = held_by(optimizer)
    refuse_retired(held)
    for values in held:
        follow(values)
    for values in held:
        values.unsettle()  # a step that raises has changed some, which a read then writes


def _write_all(optimizer: Optimizer) -> None:
    """Write the values into the weights, after another optimizer's step."""
    write(held_by(optimizer))


def _is_other_with_values(optimizer: Any) -> bool:
    """Return whether an optimizer that is not ours holds compact parameters."""
    if getattr(optimizer, "writes_weights", False):
        return False
    groups = optimizer.param_groups
    return any(getattr(p, "is_compact", False) for group in groups for p in group["params"])


@functools.cache
def watch_optimizers() -> None:
    """Let weights follow the step of every torch optimizer that holds compact parameters.

    Done when the first model is tuned and not at import: it takes Dynamo, which loads for seconds
    and which torch's optimizers load, too. A compiled step has a graph break here only if the
    optimizer holds compact parameters.
    """
    take_over, write_all = (torch.compiler.disable(f) for f in (_take_over, _write_all))

    def before_step(optimizer: Any, *_: Any) -> None:
        if _is_other_with_values(optimizer):
            take_over(optimizer)

    def after_step(optimizer: Any, *_: Any) -> None:
        if _is_other_with_values(optimizer):
            write_all(optimizer)

    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)
