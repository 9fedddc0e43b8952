"""Which tensors come from the model alone, and which may come from the batch.

Asked only where every batched layer mixes samples: that is a loss between samples, unless the rows
of these layers are no samples, such as the inputs of a hypernetwork or a grid of coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fishfast.fisher.engine.operands import tensors_in

__all__ = ["Origins"]

# Functions that make tensors of sizes alone. Those that make one of other data are not known.
_FACTORIES = {
    torch.arange, torch.linspace, torch.logspace, torch.zeros, torch.ones, torch.full, torch.eye,
    torch.empty, torch.meshgrid, torch.tril_indices, torch.triu_indices,
}  # fmt: skip
# Where numbers leave a tensor, and could come back in another one.
_ESCAPES = {"item", "tolist", "numpy", "__array__", "__int__", "__float__", "__index__", "data_ptr"}


class Origins(TorchFunctionMode):
    """While it is entered, follows what is computed from the model's own tensors alone.

    Its parameters, buffers and attributes, and what is made of sizes only. All else may come from
    the batch.

    Args:
        model: whose tensors.
        batch: tensors that are the batch's, even if the model has kept them.
    """

    def __init__(self, model: nn.Module, batch: Iterable[Tensor]) -> None:
        super().__init__()
        self._known: dict[int, Tensor] = {}  # by memory; held, so that no address is used twice
        self._escaped = False
        self._add([*model.parameters(), *model.buffers()])
        for module in model.modules():
            for value in vars(module).values():
                inside = value.values() if isinstance(value, dict) else value
                several = isinstance(value, (dict, list, tuple))
                self._add([t for t in (inside if several else [value]) if isinstance(t, Tensor)])
        for tensor in batch:
            self._known.pop(_memory(tensor), None)

    def knows(self, tensor: Tensor) -> bool:
        """Return whether a tensor comes from the model alone."""
        return _memory(tensor) in self._known

    def _add(self, values: Any) -> None:
        for tensor in tensors_in(values):
            self._known[_memory(tensor)] = tensor

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a call, and note whether its results come from the model alone."""
        kwargs = kwargs or {}
        used = list(tensors_in((args, kwargs)))
        known = all(map(self.knows, used)) if used else func in _FACTORIES and not self._escaped
        result = func(*args, **kwargs)
        if not known and used and getattr(func, "__name__", "") in _ESCAPES:
            self._escaped = True
        if known:
            self._add(result)
        else:
            written = args[:1] if getattr(func, "__name__", "") == "__setitem__" else ()
            for tensor in tensors_in((result, written)):  # in place: not known any more
                self._known.pop(_memory(tensor), None)
        return result


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or of another library
        return id(tensor)
