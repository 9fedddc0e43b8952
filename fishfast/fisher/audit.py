"""What the losses depend on: intercepted calls, and parameters that no such call covers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fishfast.fisher.operands import Operand, Tracker, disjoint_groups

__all__ = ["Audit", "audit"]


# Uses of overlapping parts of parameters: nodes, and which of their operands.
Group = list[tuple[Any, int]]


class Audit(NamedTuple):
    """What a walk over the autograd graph found.

    Attributes:
        calls: the nodes of the intercepted calls.
        foreign: name -> what uses it, for parameters that are used by something else too.
        groups: node -> for each operand the uses, itself among them, that are summed with it.
        used: the names of all parameters that the losses depend on.
    """

    calls: list[Any]
    foreign: dict[str, str]
    groups: dict[Any, list[Group | None]]
    used: set[str]


def audit(losses: Tensor, tracker: Tracker) -> Audit:
    """Walk the graph from the losses to every tracked parameter.

    Intercepted calls have no edge to their operands: an edge that ends at a parameter is a use that
    no rule covers, whatever the model did with its weights (custom functions, in-place code).

    Args:
        losses: of a forward under the interception.
        tracker: the tracked parameters.

    Returns:
        What was found.

    Raises:
        ValueError: a checkpoint that hides its inner graph.
    """
    calls: list[Any] = []
    foreign: dict[str, str] = {}
    seen, stack = {losses.grad_fn}, [losses.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "activation checkpoints must not be reentrant: the parameters inside one are "
                "hidden from the audit; got a checkpoint function of another library; use "
                "torch.utils.checkpoint"
            )
        if hasattr(node, "rule"):
            calls.append(node)
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            name = tracker.name(getattr(parent, "variable", None))
            if name is not None:
                foreign.setdefault(name, _call_name(node))
            elif parent not in seen:
                seen.add(parent)
                stack.append(parent)
    uses = [
        (node, i, operand)
        for node in calls
        for i, operand in enumerate(node.operands)
        if operand is not None
    ]
    used = set(foreign).union(*(operand.names for _, _, operand in uses))
    return Audit(calls, foreign, _groups(calls, uses), used)


def _call_name(node: Any) -> str:
    """Return what a user would recognise: "addmm" for AddmmBackward0."""
    return str(node.name()).partition("Backward")[0].lower() or "a custom function"


def _groups(
    calls: list[Any], uses: list[tuple[Any, int, Operand]]
) -> dict[Any, list[Group | None]]:
    """Join the uses of each parameter that overlap, across operands of several parameters."""
    by_name: dict[str, list[int]] = {}
    for place, (_, _, operand) in enumerate(uses):
        for name in operand.names:
            by_name.setdefault(name, []).append(place)
    group_of: list[Group] = [[(node, i)] for node, i, _ in uses]
    for places in by_name.values():
        if len(places) == 1:
            continue
        first: dict[int, int] = {}
        numbers = disjoint_groups(uses[place][2].region for place in places)
        for place, number in zip(places, numbers, strict=True):
            joined, group = group_of[first.setdefault(number, place)], group_of[place]
            if group is not joined:
                joined += group
                group_of = [joined if other is group else other for other in group_of]
    groups: dict[Any, list[Group | None]] = {node: [None] * len(node.operands) for node in calls}
    for (node, i, _), group in zip(uses, group_of, strict=True):
        groups[node][i] = group
    return groups
