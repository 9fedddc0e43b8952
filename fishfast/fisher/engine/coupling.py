"""Whether losses depend on more than one sample each: what gradients say, before any is squared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fishfast.fisher.engine.audit import Audit
from fishfast.fisher.engine.rows import layouts
from fishfast.fisher.engine.rules import BroadcastRule

__all__ = ["COUPLED", "SamplesReached", "names_of", "refuse_coupled"]

COUPLED = (
    "loss_fn must return losses that depend on one sample each; the gradient of one loss reaches "
    "other samples in every batched layer, {0!r} for one (a batch mean, or a loss between "
    "samples); use reduction='none'"
)


def refuse_coupled(several: list[Any], found: Audit, with_origins: Callable[[], Audit]) -> None:
    """Refuse losses that mix samples in every call, unless the rows of all of them are no samples.

    Args:
        several: the calls where a row has the gradients of several samples.
        found: all calls.
        with_origins: runs the forward again; its calls know whether their inputs are constants.

    Raises:
        ValueError: a call has samples in its rows.
    """
    telling = [
        place for place, node in enumerate(found.calls)
        if node in several and not isinstance(node.rule, BroadcastRule)
        and node.rule.sees_data and layouts(node.lead, found.num_samples)
    ]  # fmt: skip
    if not telling:
        return
    again = with_origins()
    for place in telling:
        if again.structure != found.structure or again.calls[place].rule.sees_data:
            raise ValueError(COUPLED.format(names_of([found.calls[place]])[0]))


class SamplesReached:
    """Counts the samples that one loss's gradient reaches in calls whose rows may be samples.

    Args:
        size: the batch's samples.

    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._counts: list[int] = []

    @property
    def most(self) -> int:
        """Return the largest count; that of the batch where no such call was reached."""
        return max(self._counts, default=self._size)

    def observe(self, node: Any, x: Tensor | None, grad: Tensor) -> None:
        """Count those of one call; a forward of one row alone has one."""
        fitting = layouts(node.lead, self._size)
        if not node.rule.sees_data or not (fitting or node.lead[0] == 1):
            return
        rows = fitting[0].by_sample(grad, node.lead, self._size) if fitting else grad[None]
        self._counts.append(int((rows.flatten(1) != 0).any(1).sum()))


def names_of(nodes: list[Any]) -> list[str]:
    """Return the names of all operands of these calls."""
    operands = [operand for node in nodes for operand in node.operands if operand is not None]
    return sorted({name for operand in operands for name in operand.names})
