"""What the losses depend on: intercepted calls, and parameters that no such call covers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishfast.fisher.engine.operands import Tracker
from fishfast.fisher.engine.plan import Group, Plan, Plans
from fishfast.fisher.engine.row_order import Consumer, is_python, signed_dim

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
# What a model may choose by its data: dims that samples may be in, without changing any size.
_CHOSEN = (
    "_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1", "_saved_dimension",
    "_saved_keepdim", "_saved_normalized_shape",
)  # fmt: skip
_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}


class Audit:
    """What a walk over the autograd graph found.

    Attributes:
        calls: the nodes of the intercepted calls.
        foreign: name -> what uses it, for parameters that are used by something else too.
        plan: where the gradients of the calls go.
        structure: the same for graphs of the same calls that feed each other in the same way,
            whatever the sizes, and cut the samples' dim in the same places.
        nodes: all nodes of the graph, but for its leaves.
        views: those that give their argument another shape.
        cuts: where dims behind the first two are cut that have as many elements as samples.
        movers: those where tensors of indices put rows elsewhere.
        python: those whose gradients pass through Python (a hook, a custom function), which need
            not treat each sample by itself.
        others: leaves with a gradient that are no tracked parameter.
        num_samples: B.
    """

    def __init__(
        self, calls: list[Any], foreign: dict[str, str], plan: Plan, structure: int,
        nodes: list[Any], views: list[Any], cuts: list[str], movers: list[Any],
        python: list[Any], others: list[Tensor], num_samples: int,
    ) -> None:  # fmt: skip
        self.calls, self.foreign, self.plan, self.structure = calls, foreign, plan, structure
        self.nodes, self.views, self.cuts = nodes, views, cuts
        self.movers, self.python = movers, python
        self.others = others
        self.num_samples = num_samples

    @functools.cached_property
    def groups(self) -> dict[Any, list[Group | None]]:
        """Node -> for each operand the uses, itself among them, that are summed with it."""
        return dict(zip(self.calls, self.plan.groups, strict=True))

    @functools.cached_property
    def moved(self) -> set[Any]:
        """The calls whose rows tensors of indices put elsewhere before the losses."""
        return _calls_above(self.movers)

    @functools.cached_property
    def unproven(self) -> set[Any]:
        """The calls that nodes in Python depend on."""
        return _calls_above(self.python)

    @functools.cached_property
    def consumers(self) -> dict[Any, list[Consumer]]:
        """Node -> what uses its outputs."""
        consumers: dict[Any, list[Consumer]] = {}
        for node in self.nodes:
            for position, (parent, output) in enumerate(node.next_functions):
                if parent is not None:
                    consumers.setdefault(parent, []).append(Consumer(node, position, output))
        return consumers


class _Kind(NamedTuple):
    """What the nodes of one type have in common.

    Attributes:
        name: of the nodes.
        is_call: whether they are intercepted calls.
        is_asked: whether nodes of the kind differ in more than their inputs.
        is_leaf: whether they end at a parameter or another leaf.
        is_python: whether gradients pass through Python, in a function that is none of ours.
        is_view: whether they give their argument another shape.
        chosen: attributes that tell one from another.
    """

    name: str
    is_call: bool
    is_asked: bool
    is_leaf: bool
    is_python: bool
    is_view: bool
    chosen: tuple[str, ...]


_KINDS: dict[type, _Kind] = {}
_REENTRANT = "CheckpointFunctionBackward"


def _kind(node: Any) -> _Kind:
    name = node.name()
    asked = name in _MOVING or name in _CUTTING or name == _REENTRANT
    chosen = tuple(saved for saved in _CHOSEN if hasattr(node, saved))
    is_call = hasattr(node, "rule")
    python = is_python(node) and not is_call
    kind = _Kind(
        name, is_call, asked, hasattr(node, "variable"), python, name in _VIEWS, chosen
    )  # fmt: skip
    if type(node).__name__ == name:  # nodes of other libraries share one type
        _KINDS[type(node)] = kind
    return kind


def audit(losses: Tensor, tracker: Tracker, hooked: list[Any], plans: Plans) -> Audit:
    """Walk the graph from the losses to every tracked parameter.

    Intercepted calls have no edge to their operands: an edge that ends at a parameter is a use that
    no rule covers, whatever the model did with its weights (custom functions, in-place code).

    Args:
        losses: of a forward under the interception.
        tracker: the tracked parameters.
        hooked: nodes whose outputs have hooks.
        plans: those of the graphs seen before.

    Returns:
        What was found.

    Raises:
        ValueError: a checkpoint that hides its inner graph.
    """
    calls: list[Any] = []
    foreign: dict[str, str] = {}
    walked: list[Any] = [losses.output_nr]
    movers: list[Any] = []
    python: list[Any] = []
    views: list[Any] = []
    cuts: list[str] = []
    nodes: list[Any] = []
    others: list[Tensor] = []
    num_samples = len(losses)
    start: list[Any] = [losses.grad_fn] if num_samples else []  # no sample may count
    numbers = dict.fromkeys(start, 0)  # in the order in which the walk meets the nodes
    stack = list(start)
    while stack:
        node = stack.pop()
        nodes.append(node)
        kind = _KINDS.get(type(node)) or _kind(node)
        walked.append(kind.name)
        if kind.is_call:
            calls.append(node)
            walked.append(type(node.rule))
            walked += [operand and operand.names for operand in node.operands]
        elif kind.is_asked:
            walked.append(_answer(kind.name, node, num_samples, cuts))
            if _moves(kind.name, node, num_samples):
                movers.append(node)
        elif kind.is_python:
            python.append(node)
        elif kind.is_view:
            views.append(node)
        if kind.chosen:
            walked += [getattr(node, saved) for saved in kind.chosen]
        for parent, output in node.next_functions:
            if parent is None:
                walked.append(None)
                continue
            number = numbers.get(parent)
            if number is None:
                number = numbers[parent] = len(numbers)
                if (_KINDS.get(type(parent)) or _kind(parent)).is_leaf:
                    name = tracker.name(parent.variable)
                    walked.append(name)
                    if name is not None:
                        _refuse_counts_of_batch(name, node, num_samples)
                        foreign[name] = _call_name(node)
                    else:
                        others.append(parent.variable)
                else:
                    stack.append(parent)
            walked += (number, output)
    structure = hash(tuple(walked))
    plan = plans.of(structure, [node.operands for node in calls])
    python += [node for node in hooked if node in numbers]
    return Audit(
        calls, foreign, plan, structure, nodes, views, cuts, movers, python, others, num_samples
    )  # fmt: skip


def _refuse_counts_of_batch(name: str, node: Any, num_samples: int) -> None:
    if num_samples > 1 and getattr(node, "_saved_scale_grad_by_freq", False):
        raise ValueError(
            f"scale_grad_by_freq must be False for {name!r}: its gradient is divided by how often "
            "a row comes in the whole batch; set it to False, or score batches of one sample each"
        )


def _answer(name: str, node: Any, num_samples: int, cuts: list[str]) -> Any:
    """Return what tells this node from others of its kind."""
    if name == _REENTRANT:
        raise ValueError(
            "activation checkpoints must not be reentrant: the parameters inside one are "
            "hidden from the audit; got a checkpoint function of another library; use "
            "torch.utils.checkpoint"
        )
    return _cut(node, num_samples, cuts) if name in _CUTTING else None


def _moves(name: str, node: Any, num_samples: int) -> bool:
    """Whether tensors say which sample's row goes where; they do not in ``x[arange(B), ids]``."""
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


def _cut(node: Any, num_samples: int, cuts: list[str]) -> Any:
    """Return where a call cuts, or turns, the samples; None for another dim.

    Behind the first two dims they seldom are: a dim of heads may have as many in one batch, whose
    structure is that of the next one. There the cut is added to ``cuts``.
    """
    dims = getattr(node, "_saved_dims", None)
    deep = False
    if dims is None:
        sizes = node._saved_self_sym_sizes
        dim = signed_dim(node._saved_dim, len(sizes))
        if dim != 0 and sizes[dim] != num_samples:
            return None
        deep = dim > 1
    found = str([getattr(node, name) for name in _CUTTING[node.name()]] + [dims])
    if deep:
        cuts.append(found)
    return None if deep else found


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
