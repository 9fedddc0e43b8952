"""`CompactParameter`: k values of a weight, and what keeps the two in agreement.

Either may be written to from outside: the weight by ``nn.init`` or ``load_state_dict``, the values
by an EMA swap, ``vector_to_parameters`` or a perturbation. Version counters tell. Whoever reads a
masked weight calls `settle` first, so values that were written to are in their weight by then.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fishfast.training.values.target import Target

__all__ = ["CompactParameter", "settle"]

_DATA: Any = torch.Tensor.data


class CompactParameter(nn.Parameter):
    """The fp32 masters of a weight's selected values; ``target`` says where they go.

    Attributes:
        plain: the same memory and version counter as a `torch.Tensor`, whose attributes torch reads
            in a third of the time it takes for a subclass.
        agreed: version of the values that are in the weight.
    """

    target: Target
    plain: Tensor
    agreed: int

    def __new__(cls, values: Tensor, target: Target | None, requires_grad: bool = True) -> Any:
        """Make the parameter from fp32 values, which are those of the weight."""
        parameter = torch.Tensor._make_subclass(cls, values, requires_grad)
        parameter.mark_written()
        if target is not None:
            parameter.target = target
        return parameter

    @property
    def data(self) -> Tensor:
        """The values without autograd; unlike torch's, what is written into them is counted."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        _DATA.__set__(self, values)
        self.plain = self.detach()
        torch.autograd.graph.increment_version(self)

    def mark_written(self) -> None:
        """Remember the values as they are: they are in the weight."""
        self.plain = self.detach()
        self.agreed = self.plain._version

    def write_(self) -> None:
        """Write the values into the weight."""
        self.target.scatter_(self)
        self.mark_written()

    def refresh_(self) -> None:
        """Take over weights that were changed from outside, such as by ``load_state_dict``.

        A master that still rounds to its weight is kept, with its extra bits.
        """
        with torch.no_grad():
            weights = self.target.gather()
            agree = self.detach().to(weights.dtype) == weights
            self.copy_(torch.where(agree, self, weights.float()))
        self.target.mark_seen(self.target.weight())
        self.mark_written()

    def follow_(self) -> None:
        """Make values and weight agree after either was written to, or the weight replaced.

        Where both were, the weight's values stand.
        """
        weight, written = self.target.weight(), self.plain._version != self.agreed
        # A copy has not seen its weight yet, which agreed with the values when it was made.
        is_new_copy = not self.target.has_seen
        if self.target.changed(weight) and not (written and is_new_copy):
            self.refresh_()
        elif written:
            self.write_()

    def refuse_unwritten(self, name: str) -> None:
        """Refuse values that are not in the weight, though `follow_` was called.

        Args:
            name: what the error calls them.

        Raises:
            RuntimeError: values or weight were written to and no version counts it.
        """
        weights = self.target.gather()
        if not torch.equal(self.detach().to(weights.dtype), weights):
            raise RuntimeError(
                f"the values of {name!r} were not written into the weights: something wrote to "
                "either past autograd, such as through weight.data or numpy; write in no_grad mode"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactParameter:
        """Copy values and target; the module in the target is the one that is being copied."""
        if id(self) in memo:
            return memo[id(self)]
        copied = CompactParameter(self.detach().clone(), None, self.requires_grad)
        memo[id(self)] = copied
        copied.target = copy.deepcopy(self.target, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the values, then the target, which refers back to this parameter's module."""
        # The target travels as state: as an argument it would need this object before it exists.
        return _rebuild_compact, (self.detach(), self.requires_grad), self.target

    def __setstate__(self, target: Target) -> None:
        self.target = target


def _rebuild_compact(values: Tensor, requires_grad: bool) -> CompactParameter:
    return CompactParameter(values, None, requires_grad)


def settle(values: Any) -> None:
    """Write values into their weight if anything wrote to them since they were there.

    A weight that was changed, too, stays as it is: `CompactParameter.follow_` decides in the next
    step. Code under torch.compile passes by: a write is no part of the graph that it traces.

    Args:
        values: a compact parameter; anything else, such as what torch.func puts in its place, has
            no weight.
    """
    if (
        type(values) is CompactParameter
        and not is_dynamo_compiling()
        and values.plain._version != values.agreed
    ):
        target = values.target
        if target.agrees() or not target.has_seen:
            values.write_()
