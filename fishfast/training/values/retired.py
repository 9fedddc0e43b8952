"""Whether the model trains these values now: said in words where it does not."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fishfast.training.values.masters import CompactParameter
from fishfast.training.values.target import Target

__all__ = ["VALUES_SUFFIX", "refuse_retired", "say_replaced"]

VALUES_SUFFIX = "_values"


def refuse_retired(parameters: Iterable[Tensor]) -> None:
    """Refuse values that the model does not train now.

    Raises:
        RuntimeError: another mask replaced them, the model was released or is lent, or something
            else is in their place. Without a gradient that would go unnoticed.
    """
    for parameter in parameters:
        if not isinstance(parameter, CompactParameter):
            continue
        target = parameter.target
        module, name = target.owners[0]
        if target.retired:
            target.weight()  # raises
        if (held := module._parameters.get(name + VALUES_SUFFIX)) is not parameter:
            raise RuntimeError(_why_not_trained(target, held))


def _why_not_trained(target: Target, held: Tensor | None) -> str:
    """Say what became of values that an optimizer still holds: others are held in their place."""
    module, name = target.owners[0]
    if target.lent:
        return (
            f"{target.name!r} does not train within a with tuned.released() block, which lends the "
            "plain model; step after the block"
        )
    if isinstance(held, CompactParameter):
        return (
            f"parameters must be those that the model trains now; got those of {target.name!r} "
            "from before release(); make a new optimizer from the later train_only's parameters()"
        )
    if name in getattr(module, "_masked", {}):
        return say_replaced(target, held)
    return (
        f"{target.name!r} does not train any more: release() gave the plain model back; to go on, "
        "call train_only again and make a new optimizer from its handle's parameters()"
    )


def say_replaced(target: Target, held: Tensor | None) -> str:
    """Say that something else is in the place of trained values, and what to do.

    Args:
        target: of the values.
        held: what the module has in their place.

    Returns:
        The message.
    """
    if type(held).__name__ == "DTensor":
        return (
            "a tuned model cannot be sharded; fully_shard put a DTensor in the place of the "
            f"trained values of {target.name!r}; use DistributedDataParallel"
        )
    return (
        f"the trained values of {target.name!r} must be a compact parameter; got "
        f"{type(held).__name__} in their place; write into them, or release() before replacing them"
    )
