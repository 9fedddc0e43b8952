"""One sample's gradients, from a backward of its loss alone: for calls that are not batched."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fishfast.fisher.engine.audit import Audit
from fishfast.fisher.engine.operands import Tracker
from fishfast.fisher.engine.rows import Layout, Rows

__all__ = ["SampleRecorder"]


class SampleRecorder:
    """Adds up the gradients of one loss, over the uses of each parameter.

    Args:
        tracker: the tracked parameters.
        found: the calls.
        groups: the groups of uses to record, by identity.

    Attributes:
        total: name -> fp32 gradient, of the parameter's shape.
    """

    def __init__(self, tracker: Tracker, found: Audit, groups: set[int]) -> None:
        self.tracker, self.found, self.groups = tracker, found, groups
        self.total: dict[str, Tensor] = {}

    def observe(self, node: Any, x: Tensor | None, grad: Tensor) -> None:
        """Record one call; all of its rows are the sample's."""
        if grad.numel() == 0:
            return
        rows = Rows(node.lead, 1, Layout("one"))
        for i, group in enumerate(self.found.groups.get(node, ())):
            if group is None or id(group) not in self.groups:
                continue
            for grads in node.rule.use(i, x, grad, rows).grads():
                for name, part in self.tracker.pull_back(node.operands[i], grads).items():
                    self.add(name, part[0])

    def add(self, name: str, grad: Tensor) -> None:
        """Add another part of a parameter's gradient."""
        before = self.total.get(name)
        self.total[name] = grad.float() if before is None else before + grad.float()
