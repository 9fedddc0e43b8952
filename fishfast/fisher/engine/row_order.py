"""Whether rows of several samples in one dim stay in order until a dim is the sample again.

A call that flattens ``[B, T, D]`` (GPT-2's addmm, windows of images) and a call over packed samples
of different lengths see the same rows when the lengths happen to be equal. What tells them apart is
what follows: the one is unflattened into B samples again, the other is pooled by a mask, attends
within a block of a matrix, or is cut at lengths. So from the call on only operations are let pass
that keep every row to itself, whatever the data are; any other means: look again in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fishfast.fisher.engine.rows import Layout

__all__ = ["Consumer", "signed_dim", "stays_in_order"]


class Consumer(NamedTuple):
    """A node of the graph that uses another one's output.

    Attributes:
        node: the one that uses it.
        position: which of its arguments.
        output: which output of the other one.
    """

    node: Any
    position: int
    output: int


# Each element by itself, or each row by itself: dim 0 stays where its size does.
_BY_ROW = {
    f"{name}Backward{number}" for number in (0, 1, 2)
    for name in (
        "Abs", "Add", "Addcmul", "Clamp", "ClampMax", "ClampMin", "Clone", "Cos", "Div", "Elu",
        "Erf", "Exp", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh",
        "LeakyRelu", "Log", "LogSigmoid", "MaskedFill", "Mish", "Mul", "NativeDropout",
        "NativeLayerNorm", "Neg", "NllLoss", "Pow", "Reciprocal", "Relu", "Rsqrt", "Rsub",
        "Sigmoid", "Silu", "Sin", "Softplus", "Sqrt", "Sub", "Tanh", "ToCopy", "Where",
    )
}  # fmt: skip
# The same, if dim 0 is none of the dims that they work along.
_ALONG_DIMS = {
    f"{name}Backward{number}" for number in (0, 1, 2)
    for name in (
        "Cat", "Gather", "LogSoftmax", "Mean", "Permute", "SafeSoftmax", "Select", "Slice",
        "Softmax", "Split", "SplitWithSizes", "Squeeze", "Sum", "Transpose", "Unbind", "Unsqueeze",
    )
}  # fmt: skip
# Products: which argument's rows are the result's.
_ROWS_OF_ARGUMENT = {"MmBackward0": 0, "LinearBackward0": 0, "ConvolutionBackward0": 0,
                     "AddmmBackward0": 1}  # fmt: skip
_BATCHED = {"BmmBackward0", "BaddbmmBackward0"}
_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}


def stays_in_order(
    call: Any, layout: Layout, num_samples: int, consumers: Mapping[Any, Sequence[Consumer]]
) -> bool:
    """Return whether a flattened layout is certain.

    Args:
        call: the node of the call.
        layout: "blocks" or "cycle".
        num_samples: B.
        consumers: node -> what uses its outputs, up to the losses.

    Returns:
        Whether every path goes through such operations until a dim is the sample.
    """
    seen, stack = {call}, [call]
    while stack:
        node = stack.pop()
        for consumer in consumers.get(node, ()):
            before = tuple(node._input_metadata[consumer.output].shape)
            after = [tuple(meta.shape) for meta in consumer.node._input_metadata]
            if not all(_keeps_order(consumer, before, s, layout, num_samples) for s in after):
                return False
            unflattened = all(_is_unflattened(before, s, layout, num_samples) for s in after)
            if consumer.node not in seen and not unflattened:
                seen.add(consumer.node)
                stack.append(consumer.node)
    return True


def _is_unflattened(
    before: tuple[int, ...], after: tuple[int, ...], layout: Layout, num_samples: int
) -> bool:
    if layout.kind == "blocks":
        return after[0] == num_samples
    return len(after) > 1 and after[1] == num_samples and after[0] * after[1] == before[0]


def _keeps_order(
    consumer: Consumer, before: tuple[int, ...], after: tuple[int, ...], layout: Layout,
    num_samples: int,
) -> bool:  # fmt: skip
    if not before or not after:
        return False
    node, name = consumer.node, consumer.node.name()
    same_rows = before[0] == after[0]
    if name in _VIEWS:
        if layout.kind == "blocks":  # the order of elements is that of the samples
            return after[0] % num_samples == 0
        return same_rows or (len(after) > 1 and after[0] * after[1] == before[0])
    if not same_rows:
        return False
    if name in _BY_ROW or name == "ExpandBackward0":
        return len(before) == len(after)
    if name in _ALONG_DIMS:
        return 0 not in _dims(node, max(len(before), len(after)))
    if name in _ROWS_OF_ARGUMENT:
        return consumer.position == _ROWS_OF_ARGUMENT[name]
    if hasattr(node, "rule"):
        return True
    batched = name in _BATCHED or name.startswith("ScaledDotProduct")
    return batched and len(after) >= 3


def _dims(node: Any, num_dims: int) -> set[int]:
    """Return the dims along which a call works; 0 among them where it does not say."""
    if "Permute" in node.name():
        stays = signed_dim(node._saved_dims[0], num_dims) == 0  # what comes to dim 0
        return set() if stays else {0}
    found: set[int] = set()
    for name in ("_saved_dim", "_saved_dim0", "_saved_dim1"):
        value = getattr(node, name, ())
        found.update(value if isinstance(value, (tuple, list)) else (value,))
    return {signed_dim(dim, num_dims) for dim in found} or {0}


def signed_dim(dim: int, num_dims: int) -> int:
    """Return a dim that a node has saved, from 0: negative ones come as unsigned 64-bit numbers."""
    return (dim - 2**64 if dim >= 2**63 else dim) % num_dims
