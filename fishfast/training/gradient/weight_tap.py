"""The gradient tap: a frozen weight whose gradient goes to its compact parameter.

The tap is an autograd function that returns a weight W as it is; its backward gives the compact
parameter ``dW[indices]``. Modules read W through a property on a per-instance subclass of their
class, so any code that reads the attribute is covered, and uses of W in several places add up. The
dense dW lives for a moment; `fishfast.training.gradient.layers` computes the gradient without it.

A tap costs 20 us to make and 1 us to read again, so each weight keeps one (`KeptTap`): its node
saves no tensors, and autograd can run it in any number of backwards.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fishfast.training.values.masters import CompactParameter
from fishfast.training.values.retired import VALUES_SUFFIX
from fishfast.training.values.sync import settle
from fishfast.training.values.target import Target

__all__ = ["GradientTap", "has_own_values", "is_traced", "seen_weight", "tapped_property"]

# A kept tap gathers once for all uses of a weight in a backward, and autograd adds the dense
# gradients of these up until the last one came. Above this many bytes each use is gathered alone.
_SMALL = 2**20
# Before every other sequence number of autograd: the engine runs a node with a higher one first.
_FIRST = 2**64 - 1
_is_transformed = torch._C._are_functorch_transforms_active


def is_traced() -> bool:
    """Return whether torch.compile or a transform of torch.func looks on."""
    return torch.compiler.is_compiling() or _is_transformed()


class GradientTap(torch.autograd.Function):
    """``(W, values, indices) -> W``, whose gradient ``dW[indices]`` is that of ``values``.

    Where W itself is asked for its gradient, as `torch.func.functional_call` may, it gets dW.
    """

    generate_vmap_rule = True  # for torch.func: per-sample gradients of the compact parameters

    @staticmethod
    def forward(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """Return the weight."""
        return weight.detach()  # shares memory and version counter, and is no view to autograd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the indices."""
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the weight and of the values, the latter in fp32."""
        of_weight, of_values, _ = ctx.needs_input_grad
        picked = _picked(grad, ctx.saved_tensors[0]) if of_values else None
        return grad if of_weight else None, picked, None


class KeptTap(torch.autograd.Function):
    """The same in eager mode, without tensors that a backward would free.

    ``(W, values, target) -> W``
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, target: Target) -> Tensor:
        """Return the weight."""
        ctx.target = target if weight.nbytes > _SMALL else None
        ctx.indices, ctx.transposed = target.indices, None
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        """Return the gradient of the values, in fp32."""
        target = ctx.target
        if target is not None and target.tap is not None:
            target.tap.in_use = False
        if grad.layout is torch.strided and grad.dim() == 2 and not grad.is_contiguous():
            flipped = grad.t()  # as a linear layer's is
            if flipped.is_contiguous():
                if ctx.transposed is None:
                    ctx.transposed = _transposed(ctx.indices, grad.shape)
                return None, _picked(flipped, ctx.transposed), None
        return None, _picked(grad, ctx.indices), None


# Autograd calls this in a backward. Its own asks in each call which of two names was overridden.
KeptTap._backward_cls.apply = KeptTap.backward


def _transposed(indices: Tensor, shape: torch.Size) -> Tensor:
    """Return flat indices of a matrix as those of its transpose, in the same order."""
    rows, columns = shape
    flat = indices.long()
    return (flat % columns * rows + flat // columns).to(indices.dtype)


def _picked(grad: Tensor, indices: Tensor) -> Tensor:
    if grad.is_sparse:  # nn.Embedding(sparse=True)
        grad = grad.to_dense()
    if grad.is_contiguous():
        picked = (grad if grad.dim() == 1 else grad.view(-1)).index_select(0, indices)
    else:  # a view of it in order would be a copy
        picked = grad.take(indices.long())
    return picked if picked.dtype == torch.float32 else picked.float()


class _Tap:
    """A kept tap, and what it was made of.

    The tapped tensor keeps the weight's memory alive, so an equal address is the same memory.
    """

    __slots__ = (
        "address", "dtype", "in_use", "node", "small", "stream", "strides", "tapped", "trained",
        "values", "weight",
    )  # fmt: skip

    def __init__(self, weight: Tensor, values: Tensor, target: Target) -> None:
        self.weight, self.values, self.trained = weight, values, values.requires_grad
        self.address, self.dtype = weight.data_ptr(), weight.dtype
        # Of the shape that the target knows.
        self.strides = None if weight.is_contiguous() else weight.stride()
        self.stream = _stream(weight) if weight.is_cuda else None
        self.tapped: Tensor = KeptTap.apply(weight, values, target)
        self.node = self.tapped.grad_fn
        if self.node is not None:  # else every dense gradient would live until the end of backward
            self.node._set_sequence_nr(_FIRST)
        self.small, self.in_use = weight.nbytes <= _SMALL, False  # in use: read since a backward

    def is_of(self, weight: Any, values: Any) -> bool:
        """Return whether a tap made now would be the same.

        A hook that somebody put on it stays, as it does on a plain weight. What wrote into it in
        grad mode changed its node; ``retain_grad`` would keep a dense gradient for good.
        """
        tapped = self.tapped
        return (
            weight is self.weight
            and values is self.values
            and tapped.grad_fn is self.node
            and not tapped.retains_grad
            and weight.data_ptr() == self.address
            and (weight.is_contiguous() if (s := self.strides) is None else weight.stride() == s)
            and weight.dtype is self.dtype
            and values.requires_grad is self.trained
            and (self.stream is None or _stream(weight) == self.stream)
            and not _is_transformed()
        )


def _stream(weight: Tensor) -> int:
    """Return the stream of now: autograd runs a node on the one on which it was made."""
    return torch._C._cuda_getCurrentRawStream(weight.get_device())


# A kept tap holds its compact parameter through autograd's graph, in C++, and the parameter holds
# the tap through its target. Python's collector cannot look into C++ and would never free either,
# nor the model. So all kept taps are dropped before a full collection; the next reads make them.
_keeping: weakref.WeakSet[Target] = weakref.WeakSet()


def _drop_all(phase: str, info: dict[str, int]) -> None:
    if phase == "start" and info["generation"] == 2:
        for target in list(_keeping):
            target.tap = None
        _keeping.clear()


def _tapped(target: Target, weight: Tensor, values: Tensor) -> Tensor:
    """Return the weight with a tap: the kept one where it fits, or a new one."""
    if is_traced() or type(weight) is not nn.Parameter:
        return GradientTap.apply(weight, values, target.indices)
    # make_fx, which sets the same flag, traces under a dispatch mode.
    if torch.fx._symbolic_trace._is_fx_tracing_flag and not torch._C._len_torch_dispatch_stack():
        raise RuntimeError(
            f"torch.fx cannot trace the masked weight {target.name!r} in grad mode: the traced "
            "module would not train it; trace the plain model, then call train_only on what "
            "symbolic_trace returns"
        )
    kept = target.tap
    if kept is not None and kept.is_of(weight, values):
        if kept.in_use and not kept.small:
            return GradientTap.apply(weight, values, target.indices)
        kept.in_use = True
        return kept.tapped
    target.tap = None  # first: a new node takes the present stream for the parameter's own, too
    kept = _Tap(weight, values, target)
    if type(kept.tapped) is Tensor:  # no fake one
        if _drop_all not in gc.callbacks:
            gc.callbacks.append(_drop_all)
        _keeping.add(target)
        target.tap = kept
        kept.in_use = True
    return kept.tapped


def with_values(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Return a copy of a weight with other values at some entries, by differentiable operations.

    Args:
        weight: of any shape.
        values: [k].
        indices: int [k], flat, each once.
    """
    flat = weight.reshape(-1)
    return flat.scatter(0, indices.long(), values.to(weight.dtype)).view(weight.shape)


def has_own_values(module: Any, name: str) -> bool:
    """Return whether a module holds the compact parameter that its weight follows, or none.

    `torch.func.functional_call` puts other tensors in its place.

    Args:
        module: tapped.
        name: of the weight.
    """
    values = module._parameters.get(name + VALUES_SUFFIX)
    if values is None or is_dynamo_compiling():  # whose guards do not know the target's tensors
        return values is None or type(values) is CompactParameter
    return values is module._masked[name].values


def seen_weight(module: Any, name: str) -> Tensor:
    """Return a masked weight as its module's code sees it now.

    Args:
        module: tapped.
        name: of the weight.

    Returns:
        The weight; in grad mode with the gradient tap. With other values in the place of the
        compact parameter, a copy of the weight that has these.

    Raises:
        RuntimeError: the weight was taken away, or torch.fx traces it.
    """
    weight = module._parameters.get(name)
    target = module._masked[name]
    if weight is None:
        raise RuntimeError(
            f"the masked weight {target.name!r} was taken away; call release() before a "
            "parametrization, pruning or del"
        )
    values = module._parameters.get(name + VALUES_SUFFIX)
    if values is None:
        return weight
    if not has_own_values(module, name):
        return with_values(weight, values, target.indices)
    if weight.shape != target.shape:  # such as a resized embedding's
        target.weight()  # raises
    settle(values)
    if not torch.is_grad_enabled():
        return weight
    return _tapped(target, weight, values)


def tapped_property(name: str) -> property:
    """Return the attribute through which a tapped module reads its weight.

    Args:
        name: of the weight.
    """
    values_name = name + VALUES_SUFFIX

    def read(module: Any) -> Any:
        if is_dynamo_compiling():
            return seen_weight(module, name)
        try:
            # What `seen_weight` finds in nearly every call, without its other questions.
            target, parameters = module._masked[name], module._parameters
            weight, values = parameters.get(name), parameters.get(values_name)
            if weight is not None and values is target.values and weight.shape == target.shape:
                seen = target._seen
                if (
                    values.plain._version != values.agreed
                    or seen is None
                    or seen.version != weight._version
                ):
                    settle(values)
                if not torch.is_grad_enabled():
                    return weight
                kept = target.tap
                if kept is not None and kept.small and kept.is_of(weight, values):
                    return kept.tapped
            return seen_weight(module, name)
        except AttributeError as error:
            # Python would go on to nn.Module.__getattr__, which finds the weight without its tap.
            raise RuntimeError(f"the masked weight {name!r} cannot be read: {error}") from error

    return property(read)
