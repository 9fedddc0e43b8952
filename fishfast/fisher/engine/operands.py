"""Which tensors come from tracked parameters alone, and where in the parameters they lie.

A layer uses its parameter as it is, as a view (a transpose, one expert of a stack) or through a few
operations of its own (``1 + weight.float()``, ``-exp(A_log)``, weight norm). All of these are
operands of the call that meets the data. A per-sample gradient of an operand becomes one of its
parameters either by place, when the operand is the parameter or a view without overlap (squares
stay squares), or by autograd, through the operations between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishfast.fisher.engine.gradients import gradients

__all__ = ["MARK", "Operand", "Region", "Tracker", "disjoint_groups", "is_opaque", "tensors_in"]

# Backward nodes of calls that treat every element by itself.
_BY_ELEMENT = {
    "AddBackward0", "SubBackward0", "RsubBackward1", "MulBackward0", "DivBackward0", "NegBackward0",
    "ExpBackward0", "SigmoidBackward0", "TanhBackward0", "SoftplusBackward0", "ToCopyBackward0",
}  # fmt: skip
MARK = "_fishfast_sources"  # the attribute of a tensor that says what it comes from
_UNMARKED: tuple[Any, frozenset[str], int] = (None, frozenset(), 0)


class Region(NamedTuple):
    """A part of a parameter, as strides into it."""

    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor that has the parameter's strides."""
        if self.size == tensor.shape and self.stride == tensor.stride():
            return tensor
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    @property
    def interval(self) -> tuple[int, int]:
        """First and last element, counted in the parameter's storage."""
        reach = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        return self.offset, self.offset + reach


class Operand(NamedTuple):
    """What a call uses of the tracked parameters.

    Attributes:
        tensor: the parameter or a tensor computed from parameters; its graph is kept.
        names: the parameters.
        region: which part of the one parameter it is, or None if it was computed.
        is_part: whether it is another tensor than the parameter.
    """

    tensor: Tensor
    names: tuple[str, ...]
    region: Region | None
    is_part: bool = True


class Tracker:
    """Knows the tracked parameters and the tensors that are computed from them alone.

    Args:
        parameters: the tracked parameters by name.

    Attributes:
        alone: the name of each parameter as a set, by identity.
        pulled_back: parameters to which samples' gradients went back through the operations that
            compute an operand from them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.pulled_back: set[str] = set()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.alone = {id(p): frozenset((name,)) for name, p in parameters.items()}
        self._whole = {
            name: Operand(parameter, (name,), self._region(parameter), is_part=False)
            for name, parameter in parameters.items()
        }

    def whole(self, tensor: Tensor) -> Operand | None:
        """Return a tracked parameter as an operand, None for any other tensor."""
        name = self._names.get(id(tensor))
        return None if name is None else self._whole[name]

    def name(self, tensor: Any) -> str | None:
        """Return the name of a tracked parameter, None for any other object."""
        return self._names.get(id(tensor))

    def sources(self, tensor: Tensor) -> frozenset[str]:
        """Return the parameters that a tensor is computed from, if from nothing else."""
        alone = self.alone.get(id(tensor))
        if alone is not None:
            return alone
        # The mark carries its tracker: a tensor may outlive the scoring that marked it.
        tracker, names, version = getattr(tensor, MARK, _UNMARKED)
        if tracker is not self:
            return _UNMARKED[1]
        if names and tensor._version != version:  # written to since, perhaps through a view
            names = self._leaves(tensor)
            self.mark(tensor, names)
        return names

    def _leaves(self, tensor: Tensor) -> frozenset[str]:
        """Return the parameters below a tensor in the graph; none if anything else is there."""
        names, seen, stack = set(), set(), [tensor.grad_fn]
        while stack:
            node: Any = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "rule"):
                return _UNMARKED[1]
            if hasattr(node, "variable"):
                name = self.name(node.variable)
                if name is None:
                    return _UNMARKED[1]
                names.add(name)
            stack += [parent for parent, _ in node.next_functions]
        return frozenset(names)

    def mark(self, results: Any, names: frozenset[str]) -> None:
        """Remember that a call's results come from these parameters alone; none: from more."""
        for result in tensors_in(results):
            if result.requires_grad and self.name(result) is None:
                # Squares of complex gradients are none of ours: autograd keeps them.
                names = _UNMARKED[1] if result.is_complex() else names
                setattr(result, MARK, (self, names, result._version))

    def operand(self, tensor: Tensor) -> Operand | None:
        """Return a tensor as an operand, None if it is no tracked one."""
        name = self._names.get(id(tensor))
        if name is not None:
            return self._whole[name]
        names = self.sources(tensor)
        if not names:
            return None
        return Operand(tensor, tuple(sorted(names)), self._region(tensor))

    def _region(self, tensor: Tensor) -> Region | None:
        base = tensor if self.name(tensor) is not None else tensor._base
        name = self.name(base)
        if base is None or name is None or tensor.dtype != base.dtype:
            return None
        if not _fills_once(tensor) or not _fills_once(base) or not _is_dense(base):
            return None
        offset = int(tensor.storage_offset() - base.storage_offset())
        return Region(name, tuple(tensor.shape), tensor.stride(), offset)

    def slope(self, operand: Operand) -> Tensor | None:
        """Return the derivative of an operand that is a function of its parameter by elements.

        Gemma's ``1 + weight.float()`` and Mamba's ``-exp(A_log)`` are: each element of a sample's
        gradient is multiplied by the element's own derivative, which can wait until the sum.

        Returns:
            fp32, of the parameter's shape; None where elements mix or may mix.
        """
        parameter = self.parameters[operand.names[0]]
        if len(operand.names) > 1 or operand.tensor.shape != parameter.shape:
            return None
        seen: set[Any] = set()
        stack: list[Any] = [operand.tensor.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen or hasattr(node, "variable"):
                continue
            if node.name() not in _BY_ELEMENT:
                return None
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
        ones = torch.ones_like(operand.tensor)
        (slope,) = gradients(operand.tensor, [parameter], ones)
        return None if slope is None else slope.float()

    def pull_back(self, operand: Operand, grads: Tensor) -> dict[str, Tensor]:
        """Return per-sample gradients of an operand's parameters.

        Args:
            operand: what the gradients are of.
            grads: ``[samples, *operand.tensor.shape]``.

        Returns:
            Name -> fp32 ``[samples, *parameter.shape]``; parameters without influence are left out.
        """
        if operand.region is not None:
            name = operand.region.name
            full = _zeros_with_strides(self.parameters[name], len(grads))
            for target, grad in zip(full, grads, strict=True):
                operand.region.of(target).copy_(grad)
            return {name: full}
        inputs = [self.parameters[name] for name in operand.names]
        self.pulled_back.update(operand.names)
        grads = grads.to(operand.tensor.dtype)
        rows = [gradients(operand.tensor, inputs, grad) for grad in grads]
        columns = zip(*rows, strict=True)
        return {
            name: torch.stack([part for part in column if part is not None]).float()
            for name, column in zip(operand.names, columns, strict=True)
            if column[0] is not None
        }


def is_opaque(tensor: Tensor) -> bool:
    """Return whether a tensor runs torch's operations in a way of its own.

    Nested tensors, DTensors and quantized weights do: no rule knows how.

    Args:
        tensor: any.

    Returns:
        Whether it does.
    """
    return type(tensor).__torch_dispatch__ is not _PLAIN or tensor.is_nested


_PLAIN = Tensor.__torch_dispatch__


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among a call's arguments or results, in lists and dicts too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))


def _fills_once(tensor: Tensor) -> bool:
    """Whether no two elements share a place (sufficient: each stride clears the dims below it)."""
    end = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= end:
                return False
            end += stride * (size - 1)
    return True


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor without overlaps has no gaps either, so that its scores have its strides."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or reach + 1 == tensor.numel()


def _zeros_with_strides(parameter: Tensor, samples: int) -> Tensor:
    like = torch.zeros_like(parameter, dtype=torch.float32)  # keeps the strides of a dense tensor
    if samples == 1:
        return like.unsqueeze(0)
    return torch.zeros(samples, like.numel(), device=like.device).as_strided(
        (samples, *like.shape), (like.numel(), *like.stride())
    )


def disjoint_groups(regions: Iterable[Region | None]) -> list[int]:
    """Number the uses of one parameter so that uses with one number must be summed first.

    Args:
        regions: of each use; one without a region overlaps all.

    Returns:
        A number for each use; different ones where intervals do not overlap.
    """
    regions = list(regions)
    if any(region is None for region in regions):
        return [0] * len(regions)
    intervals = [region.interval for region in regions if region is not None]
    groups = [0] * len(intervals)
    group, end = -1, -1
    for i in sorted(range(len(intervals)), key=lambda i: intervals[i]):
        if intervals[i][0] > end:
            group += 1
        end = max(end, intervals[i][1])
        groups[i] = group
    return groups
