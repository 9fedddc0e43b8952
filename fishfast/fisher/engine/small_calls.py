"""Where batching does not pay: many small calls of one weight, and few samples.

A step of a recurrent net with vector weights (16 wide, 500 steps, one core of a CPU) cost 2.4 ms
with its search for rows, 0.35 ms for each backward of that. Autograd's own backward of one sample
took 0.05 ms. So there one backward for each sample is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fishfast.fisher.engine.operands import Operand
from fishfast.fisher.engine.rules import BroadcastRule, Rule

__all__ = ["SmallCalls"]

_FEW_SAMPLES, _SAMPLES_A_PROBE = 64, 7
# Uses of a weight in one forward. Layers are shared by a dozen at most; these are steps in time.
_MANY_CALLS = 64
_NEVER = -(2**62)  # a count that never gets there
# Elements of a call up to which the host decides, not the device: a backward through the whole
# batch for each sample computes as many times more than a loop. A product does 16 in the time.
_SMALL_CALL, _SMALL_PRODUCT = 2**15, 2**19


class SmallCalls:
    """Counts the small calls of each weight in a forward.

    The answers depend on sizes alone, so that scores are the same in every run.

    Attributes:
        given_up: name -> why, for parameters that are left to autograd from then on.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, ...], int] = {}
        self.given_up: dict[str, str] = {}

    def clear(self) -> None:
        """Begin another forward."""
        self._counts.clear()
        self.given_up = {}

    def note(self, rule: Rule, operands: Sequence[Operand | None]) -> Sequence[str]:
        """Count a call.

        Args:
            rule: of the call.
            operands: its weight and bias.

        Returns:
            Parameters that are not to be caught again in this forward.
        """
        operand = operands[0] or operands[1]
        if operand is None:
            return ()
        if _saves_are_hooked():  # in a checkpoint, which must hear the same when it runs again
            self._counts[operand.names] = _NEVER
            return ()
        count = self._counts[operand.names] = self._counts.get(operand.names, 0) + 1
        if count < _MANY_CALLS or not _is_small(rule, operand):
            return ()
        names = [name for of in operands if of is not None for name in of.names]
        reason = f"used in {_MANY_CALLS} small calls or more, for which the samples are too few"
        self.given_up.update(dict.fromkeys(names, reason))
        return names

    def after_search(self, num_samples: int, probes: int) -> dict[str, str]:
        """Return parameters of many calls whose rows took long to find, and are likely to again.

        Args:
            num_samples: B.
            probes: how many backwards the search took.

        Returns:
            Name -> why.
        """
        if num_samples > probes * _SAMPLES_A_PROBE:
            return {}
        reason = f"used in {_MANY_CALLS} calls or more, whose rows took {probes} backwards to find"
        many = [names for names, count in self._counts.items() if count >= _MANY_CALLS]
        return {name: reason for names in many for name in names}


def _is_small(rule: Rule, operand: Operand) -> bool:
    shape = rule.expanded if isinstance(rule, BroadcastRule) else rule.x.shape
    if shape[0] > _FEW_SAMPLES:
        return False
    if isinstance(rule, BroadcastRule) or operand.tensor.dim() < 2:
        return shape.numel() <= _SMALL_CALL
    rows = shape[: rule.num_lead(rule.x)].numel()
    return rows * operand.tensor.numel() <= _SMALL_PRODUCT


# What is entered for saved tensors, such as a checkpoint; where it cannot be asked, as if it were.
_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True
)


def _saves_are_hooked() -> bool:
    return _hooks(True) is not None
