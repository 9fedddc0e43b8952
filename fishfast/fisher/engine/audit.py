"""What the losses depend on: intercepted calls, and parameters that no such call covers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishfast.fisher.engine.operands import Operand, Tracker, disjoint_groups
from fishfast.fisher.engine.row_order import Consumer, signed_dim

__all__ = ["Audit", "audit"]


# Calls that move rows to where tensors say. All that lies between a call and the losses decides
# which sample a row belongs to: without one of these it is the same in every batch of these sizes.
_MOVING = {
    f"{name}Backward{number}" for number in (0, 1, 2)
    for name in (
        "Index", "IndexPut", "IndexSelect", "IndexAdd", "IndexCopy", "IndexFill", "IndexReduce",
        "Gather", "Scatter", "ScatterAdd", "ScatterReduce", "MaskedSelect", "MaskedScatter", "Take",
        "Put", "SegmentReduce", "Sort", "Topk", "Embedding", "EmbeddingBag", "PackPaddedSequence",
    )
}  # fmt: skip

# Calls that cut a tensor up, or turn it round: samples of other lengths, packed, are cut in other
# places.
_CUTTING = {
    "SplitWithSizesBackward0": ("_saved_split_sizes",), "SplitBackward0": ("_saved_split_size",),
    "SelectBackward0": ("_saved_index",), "SliceBackward0": ("_saved_start", "_saved_end"),
    "RollBackward0": ("_saved_shifts",),
}  # fmt: skip

# Uses of overlapping parts of parameters: nodes, and which of their operands.
Group = list[tuple[Any, int]]


class Audit(NamedTuple):
    """What a walk over the autograd graph found.

    Attributes:
        calls: the nodes of the intercepted calls.
        foreign: name -> what uses it, for parameters that are used by something else too.
        groups: node -> for each operand the uses, itself among them, that are summed with it.
        moved: the calls whose rows tensors of indices put elsewhere before the losses.
        structure: the same for graphs of the same calls in the same order, whatever the sizes, that
            cut the samples' dim in the same places.
        consumers: node -> what uses its outputs.
        num_samples: B.
    """

    calls: list[Any]
    foreign: dict[str, str]
    groups: dict[Any, list[Group | None]]
    moved: set[Any]
    structure: int
    consumers: dict[Any, list[Consumer]]
    num_samples: int


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
    walked: list[Any] = []
    movers: list[Any] = []
    consumers: dict[Any, list[Consumer]] = {}
    start = [losses.grad_fn] if len(losses) else []  # a batch in which no sample counts
    seen, stack = set(start), list(start)
    while stack:
        node: Any = stack.pop()
        walked.append(node.name())
        if node.name() in _CUTTING:
            walked.append(_cut(node, len(losses)))
        if _moves(node, len(losses)):
            movers.append(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "activation checkpoints must not be reentrant: the parameters inside one are "
                "hidden from the audit; got a checkpoint function of another library; use "
                "torch.utils.checkpoint"
            )
        if hasattr(node, "rule"):
            calls.append(node)
            walked += [type(node.rule), *(operand and operand.names for operand in node.operands)]
        for position, (parent, output) in enumerate(node.next_functions):
            if parent is None:
                continue
            consumers.setdefault(parent, []).append(Consumer(node, position, output))
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
    groups, structure = _groups(calls, uses), hash(tuple(walked))
    return Audit(
        calls, foreign, groups, _calls_above(movers), structure, consumers, len(losses)
    )  # fmt: skip


def _moves(node: Any, num_samples: int) -> bool:
    """Whether tensors say which sample's row goes where; they do not in ``x[arange(B), ids]``."""
    name = node.name()
    if name in {"IndexBackward0", "IndexPutBackward0"}:
        sizes = node._input_metadata[0].shape
        if name == "IndexBackward0":
            sizes = node._saved_self_sym_sizes
        # In dim 0, or in another dim of as many elements as there are samples.
        for dim, index in enumerate(node._saved_indices):
            if index is None or not (dim == 0 or sizes[dim] == num_samples):
                continue
            if index.dim() != 1 or index.dtype == torch.bool:
                return True
            if not torch.equal(index, torch.arange(len(index), device=index.device)):
                return True
        return False
    if name == "GatherBackward0":
        dims = node._saved_index.dim()
        return dims == 1 or node._saved_dim not in {dims - 1, 2**64 - 1}
    return name in _MOVING


def _cut(node: Any, num_samples: int) -> Any:
    """Return where a call cuts, or turns, the samples; None for another dim."""
    dims = getattr(node, "_saved_dims", None)
    if dims is None:
        sizes = node._saved_self_sym_sizes
        dim = signed_dim(node._saved_dim, len(sizes))
        if dim > 1 or (dim == 1 and sizes[dim] != num_samples):
            return None
    return str([getattr(node, name) for name in _CUTTING[node.name()]] + [dims])


def _calls_above(nodes: list[Any]) -> set[Any]:
    """Return the intercepted calls that these nodes depend on."""
    calls, seen, stack = set(), set(nodes), list(nodes)
    while stack:
        node = stack.pop()
        if hasattr(node, "rule"):
            calls.add(node)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return calls


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
    place_of = {(node, i): place for place, (node, i, _) in enumerate(uses)}
    for places in by_name.values():
        if len(places) == 1:
            continue
        first: dict[int, int] = {}
        numbers = disjoint_groups(uses[place][2].region for place in places)
        for place, number in zip(places, numbers, strict=True):
            joined, group = group_of[first.setdefault(number, place)], group_of[place]
            if group is not joined:
                joined += group
                for use in group:
                    group_of[place_of[use]] = joined
    groups: dict[Any, list[Group | None]] = {node: [None] * len(node.operands) for node in calls}
    for (node, i, _), group in zip(uses, group_of, strict=True):
        groups[node][i] = group
    return groups
