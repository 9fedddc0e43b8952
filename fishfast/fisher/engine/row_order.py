"""Where the samples lie in every tensor between the losses and the calls, by the graph alone.

Gradients tell which sample a row belongs to in one batch. Whether they lie so in the next one the
graph has to say: learned prototypes ``[K, D]`` look like K samples where each label comes once.
The sample is a digit of an element's place, ``place // step % B``: step 1 in the losses ``[B]``,
D in ``[B, D]``. From the losses on, each operation says where the digit is in its argument. A view
leaves the step as it is, a transpose moves the digit's dim; what mixes, cuts or moves samples, or
is not known here, says nothing (None), and such calls are looked at in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch.autograd.function import BackwardCFunction

__all__ = ["Consumer", "is_python", "sample_steps", "signed_dim"]

Shape = tuple[int, ...]


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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Element by element, broadcast: dims are those of the result, counted from the last one.
_BY_ELEMENT = _names("""
    Abs Acos Add Addcdiv Addcmul Alias Angle Asin Atan Atan2 BinaryCrossEntropy
    BinaryCrossEntropyWithLogits Ceil Celu Clamp ClampMax ClampMin Clone Copy Copysign Cos Cosh Div
    Elu Erf Erfc Exp Exp2 Expand Expm1 Floor Frac Gelu Hardshrink Hardsigmoid Hardswish Hardtanh
    HuberLoss KlDiv LeakyRelu Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid Logaddexp MaskedFill
    Maximum Minimum Mish MseLoss Mul NanToNum NativeDropout Neg Pow Prelu PreluKernel Reciprocal
    Relu Repeat Round Rsqrt Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh SmoothL1Loss SoftMarginLoss
    Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Tril Triu Trunc Where Xlogy
""")
# Of as many dims as the result; the sample must be another dim than those that they work along.
_ALONG = _names("""
    Cat ConstantPadNd Cummax Cummin Cumprod Cumsum Flip Gather Glu IndexAdd IndexFill IndexSelect
    LogSoftmax Logcumsumexp Roll SafeSoftmax Scatter ScatterAdd Slice Softmax Sort Split
    SplitWithSizes Topk
""")
_VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"}
# Image by image: dim 0 of the first argument (GridSampler: of both) is that of the result.
_BY_IMAGE = _names("""
    AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D AvgPool2D AvgPool3D
    ChannelShuffle Col2Im Convolution CudnnBatchNorm CudnnConvolution FractionalMaxPool2D
    GridSampler2D GridSampler3D Im2Col MaxPool2DWithIndices MaxPool3DWithIndices MkldnnConvolution
    NativeBatchNorm NativeGroupNorm PixelShuffle PixelUnshuffle ReflectionPad1D ReflectionPad2D
    ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D UpsampleBicubic2D
    UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
    UpsampleTrilinear3D
""")
# Products of matrices: the place among the arguments of the left factor; the right one follows.
_PRODUCTS = {"Mm": 0, "Bmm": 0, "Addmm": 1, "Baddbmm": 1, "Mv": 0, "Cdist": 0}


def sample_steps(
    root: Any, output: int, num_samples: int, consumers: Mapping[Any, Sequence[Consumer]]
) -> dict[tuple[Any, int], int | None]:
    """Go from the losses to everything that they depend on.

    Args:
        root: the losses' node.
        output: which of its outputs they are.
        num_samples: B, at least 2.
        consumers: node -> what uses its outputs, up to the losses.

    Returns:
        Node and output -> the step of the sample's digit, or None where it is not certain; -1 - i
        where all belongs to sample i.
    """
    steps: dict[tuple[Any, int], int | None] = {(root, output): 1}
    outputs: dict[Any, set[int]] = {root: {output}}
    waiting = {node: len(uses) for node, uses in consumers.items()}
    stack = [root]
    while stack:
        node = stack.pop()
        for position, (parent, number) in enumerate(node.next_functions):
            if parent is None:
                continue
            if not hasattr(parent, "variable"):
                before = tuple(parent._input_metadata[number].shape)
                found = {
                    _of_argument(node, out, steps[node, out], position, before, num_samples)
                    for out in outputs[node]
                }
                if (parent, number) in steps:
                    found.add(steps[parent, number])
                steps[parent, number] = found.pop() if len(found) == 1 else None
                outputs.setdefault(parent, set()).add(number)
            waiting[parent] -= 1
            if waiting[parent] == 0:
                stack.append(parent)
    return steps


def _of_argument(
    node: Any, output: int, step: int | None, position: int, before: Shape, num_samples: int
) -> int | None:
    """Return the step in an argument of shape ``before``, from that in one output."""
    if step is None:
        return None
    name = node.name().partition("Backward")[0]
    after = tuple(node._input_metadata[output].shape)
    if not all(isinstance(size, int) for size in (*before, *after)):
        return None  # nested tensors
    if step < 0:
        return _uncut(node, name, output, step, before, num_samples)
    if name in _VIEWS:
        return step if prod(before) == prod(after) else None
    place = _place(after, step, num_samples)
    if place is None:
        return None
    dim, inner = place
    if name in {"Stack", "Cat"} and dim in _dims(node, len(after)):
        single = after[dim] == num_samples and (name == "Stack" or before[dim] == 1)
        return -1 - position if single else None
    of = _dim_of_argument(node, name, position, before, after, dim, num_samples)
    if of is None or not 0 <= of < len(before) or before[of] != after[dim]:
        return None
    return inner * prod(before[of + 1 :])


def is_python(node: Any) -> bool:
    """Return whether a node is a function of the model's author, who may do there what they like.

    Those of torch and transformers (Bloom's GELU) treat every sample by itself; not so hooks.

    Args:
        node: of the graph.

    Returns:
        Whether it is.
    """
    if not isinstance(node, BackwardCFunction) or hasattr(node, "rule"):
        return False
    function: Any = node
    library = function._forward_cls.__module__.partition(".")[0]
    return library not in {"torch", "transformers"} or "Hook" in function.name()


def _uncut(
    node: Any, name: str, output: int, step: int, before: Shape, num_samples: int
) -> int | None:
    # For a result that is all one sample's: so are its arguments, unless it is cut from them. Such
    # are the results of models that take their samples apart in Python, and stack what they make.
    if name not in {"Select", "Unbind", "Slice", "Split"}:
        return step
    (dim,) = _dims(node, len(before))
    if name == "Select":
        output = signed_dim(node._saved_index, before[dim])
    elif name == "Slice":
        output = node._saved_start
    sizes = node._input_metadata[0].shape
    whole = name in {"Slice", "Split"} and sizes[dim] != 1
    if whole or before[dim] != num_samples:
        return step if before[dim] != num_samples else None
    return prod(before[dim + 1 :]) if output == -1 - step else None


def _place(shape: Shape, step: int, num_samples: int) -> tuple[int, int] | None:
    """Return the dim that holds the digit, and the digit's step in it; None if several do."""
    if 0 in shape:
        return None
    below = 1
    for dim in reversed(range(len(shape))):
        if below <= step and step * num_samples <= below * shape[dim]:
            inner = step // below
            whole = step % below == 0 and shape[dim] % (inner * num_samples) == 0
            return (dim, inner) if whole else None
        below *= shape[dim]
    return None


def _dim_of_argument(
    node: Any, name: str, position: int, before: Shape, after: Shape, dim: int, num_samples: int
) -> int | None:
    """Return which dim of an argument becomes a dim of the result, element by element."""
    aligned = dim - (len(after) - len(before))
    if hasattr(node, "rule"):  # an anchor comes before the input
        return dim if position == 1 and dim < len(node.lead) else None
    if isinstance(node, BackwardCFunction):
        return dim if before == after and not is_python(node) else None
    if name in _BY_ELEMENT:
        return aligned
    if name in _ALONG:
        whole = name == "Slice" and before == after
        return dim if whole or dim not in _dims(node, len(after)) else None
    if name in {"Permute", "Transpose", "T"}:
        return _turned(node, name, dim, len(before))
    if name in {"Select", "Unbind"}:
        (cut,) = _dims(node, len(before))
        return dim + (dim >= cut)
    if name == "Stack":
        (new,) = _dims(node, len(after))
        return None if dim == new else dim - (dim > new)
    if name in _PRODUCTS:
        return _factor(name, position - _PRODUCTS[name], len(after), dim, aligned)
    if name in _BY_IMAGE:
        both = name.startswith("GridSampler")
        return 0 if dim == 0 and (position == 0 or both) else None
    if name.startswith("ScaledDotProduct"):
        if position > 2:
            return aligned
        return dim if dim < len(after) - 2 + (position == 0) else None
    if name == "Linear":
        return dim if position == 0 and dim < len(after) - 1 else None
    if name in {"NativeLayerNorm", "FusedRmsNorm"}:
        normed = len(node._saved_normalized_shape)
        return dim if position == 0 and dim < len(after) - normed else None
    if name in {"NllLoss", "NllLoss2D"}:
        return dim + (dim > 0)
    if name == "Unfold":
        cut = signed_dim(node._saved_dimension, len(before))
        return None if dim == cut else dim
    if name == "Index":
        return _indexed(node, before, dim, num_samples)
    if name == "torch::autograd::CopySlices":  # what is written into, not what is written
        return dim if position == 0 else None
    if hasattr(node, "_saved_keepdim"):
        return _reduced(node, before, dim)
    return _only_dim(node, before, after, dim, num_samples)


def _turned(node: Any, name: str, dim: int, num_dims: int) -> int:
    if name == "Permute":
        return signed_dim(node._saved_dims[dim], num_dims)
    pair: tuple[int, ...] = (0, 1)
    if name == "Transpose":
        pair = tuple(signed_dim(d, num_dims) for d in (node._saved_dim0, node._saved_dim1))
    return pair[1 - pair.index(dim)] if dim in pair else dim


def _factor(name: str, factor: int, num_dims: int, dim: int, aligned: int) -> int | None:
    """Return the dim of a product's left (0) or right (1) factor, or of what is added to it."""
    if factor not in (0, 1):
        return aligned
    row = num_dims - (1 if name == "Mv" else 2)
    if dim < row:
        return dim  # products of a batch
    if dim == row:
        return dim if factor == 0 else None
    if factor == 0:
        return None
    return dim - 1 if name == "Cdist" else dim


def _indexed(node: Any, before: Shape, dim: int, num_samples: int) -> int | None:
    """Return the dim of ``x`` for one of ``x[indices]``.

    An index of all samples in order is taken for the dim that it is, as the audit has compared it.
    """
    indices = dict(enumerate(node._saved_indices))
    where = [place for place, index in indices.items() if index is not None]
    shapes = {tuple(indices[place].shape) for place in where}
    if any(indices[place].dtype.itemsize == 1 for place in where) or len(shapes) != 1:
        return None
    new, first = len(shapes.pop()), where[0]
    if where != list(range(first, first + len(where))):
        first = 0
    if first <= dim < first + new:
        samples = [place for place in where if place == 0 or before[place] == num_samples]
        return samples[0] if len(samples) == 1 and new == 1 else None
    rest = [place for place in range(len(before)) if place not in where]
    return rest[dim if dim < first else dim - new]


def _reduced(node: Any, before: Shape, dim: int) -> int | None:
    gone = _dims(node, len(before))
    if node._saved_keepdim:
        return None if dim in gone else dim
    return [place for place in range(len(before)) if place not in gone][dim]


def _only_dim(node: Any, before: Shape, after: Shape, dim: int, num_samples: int) -> int | None:
    """For an operation that is not known: the one dim of B elements, if it has one argument."""
    if "::" in node.name():  # a function of an extension in C++
        return None
    arguments = sum(parent is not None for parent, _ in node.next_functions)
    alone = before.count(num_samples) == after.count(num_samples) == arguments == 1
    return before.index(num_samples) if alone and after[dim] == num_samples else None


def _dims(node: Any, num_dims: int) -> set[int]:
    """Return the dims along which a call works; all where it does not say."""
    if node.name().startswith("ConstantPadNd"):
        pad = node._saved_pad
        return {num_dims - 1 - i // 2 for i, amount in enumerate(pad) if amount}
    found: set[int] = set()
    for name in ("_saved_dim", "_saved_dims"):
        value = getattr(node, name, None)
        if value is not None:
            found.update(value if isinstance(value, (tuple, list)) else (value,))
    return {signed_dim(dim, num_dims) for dim in found} or set(range(num_dims))


def signed_dim(dim: int, num_dims: int) -> int:
    """Return a dim that a node has saved, from 0: negative ones come as unsigned 64-bit numbers."""
    return (dim - 2**64 if dim >= 2**63 else dim) % num_dims
