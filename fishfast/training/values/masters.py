"""`CompactParameter`: the fp32 masters of a weight's k trained values, as an `nn.Parameter`.

It holds the numbers and remembers at which version they were in the weight. Who wrote last is
decided in `fishfast.training.values.sync`, and nowhere else.

Each compact parameter has memory of its own. One buffer for all of them was considered: a step asks
every address anyway, and a file of one view would hold the whole buffer.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fishfast.training.values.target import Target

__all__ = ["CompactParameter", "given_target"]

_DATA: Any = torch.Tensor.data
_UNSETTLED = -1  # no version is


class CompactParameter(nn.Parameter):
    """The fp32 masters of a weight's selected values; ``target`` says where they go.

    Saved or copied by itself it is a plain parameter of k values, without its model; a module that
    is saved or copied gives it its target back (`given_target`).

    Attributes:
        target: where the values go in the weight.
        plain: the same memory and version counter as a `torch.Tensor`, whose attributes torch reads
            in a third of the time it takes for a subclass.
        agreed: version of the values that are in the weight.
        is_compact: True, for code that torch.compile traces, whose ``isinstance`` does not know a
            parameter's class in an optimizer.
        from_state: masters that an optimizer's state brought, until the next step: the model may be
            loaded after the optimizer.
    """

    target: Target
    plain: Tensor
    agreed: int
    is_compact = True
    from_state: Tensor | None = None

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
        if dist.is_available() and dist.is_initialized():
            self.unsettle()  # a collective writes into it and counts nothing
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        _DATA.__set__(self, values)
        self.plain = self.detach()
        torch.autograd.graph.increment_version(self)

    def is_complex(self) -> bool:
        """Return False; torch's collectives ask this before they write, which counts no version."""
        self.unsettle()
        return False

    def unsettle(self) -> None:
        """Let the next read of the weight write the values, whatever the version counters say."""
        self.agreed = _UNSETTLED

    @property
    def is_written(self) -> bool:
        """Whether the values were, or may have been, written to since they were in the weight."""
        return self.plain._version != self.agreed

    def mark_written(self) -> None:
        """Remember the values as they are: they are in the weight."""
        self.plain = self.detach()
        self.agreed = self.plain._version

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Copy as a compact parameter within its module, and as a plain one by itself."""
        if id(self) not in memo:
            copied = memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
            if id(self.target.owners[0][0]) in memo:  # which is being copied
                given_target(copied, copy.deepcopy(self.target, memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain parameter, which torch reads with ``weights_only=True``."""
        values = self.detach()
        if values.untyped_storage().nbytes() > values.nbytes:
            values = values.clone()  # without the rest of a storage that they are a part of
        return torch._utils._rebuild_parameter, (values, self.requires_grad, OrderedDict())


def given_target(parameter: nn.Parameter, target: Target) -> CompactParameter:
    """Make an unpickled or copied parameter a compact one again, the same object.

    Args:
        parameter: with the values; an optimizer that was saved with the model holds it, too.
        target: where they go.

    Returns:
        The parameter.
    """
    parameter.__class__ = CompactParameter
    compact: CompactParameter = parameter  # type: ignore[assignment]
    compact.target, target.values = target, compact
    compact.mark_written()
    return compact
