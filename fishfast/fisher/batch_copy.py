"""A batch's containers and objects, copied for each forward; its tensors are shared."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copied_batch"]

# What nothing can be written into, or what is no part of a batch.
_KEPT = (
    nn.Module, str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType,
    types.GeneratorType,
)  # fmt: skip
_DEEPEST = 50  # objects in objects: those of a long chain, such as a tree's, are not all copied


def copied_batch(batch: Any) -> tuple[Any, list[Tensor]]:
    """Copy a batch of any kind: a forward may rewrite it, and may run again.

    Mappings, lists, dataclasses and other objects (graphs, BatchEncodings) are copied with all that
    they hold; what cannot be copied, such as an iterator, is handed on as it is.

    Args:
        batch: what ``batches`` gave.

    Returns:
        The copy, and the tensors in it, which are those of the batch.
    """
    tensors: list[Tensor] = []
    copies: dict[int, Any] = {}

    def own(value: Any, depth: int = 0) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return value
        if depth > _DEEPEST or isinstance(value, _KEPT) or not _says_how(value):
            return value
        if id(value) not in copies:
            copies[id(value)] = value  # until its copy is there, for what refers to itself
            copies[id(value)] = copied(value, depth + 1)
        return copies[id(value)]

    def copied(value: Any, depth: int) -> Any:
        if isinstance(value, tuple):
            items = [own(item, depth) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
        try:
            result = copies[id(value)] = copy.copy(value)
        except Exception:  # noqa: BLE001  # whatever a class of the user's raises
            return value
        if isinstance(result, list):
            result[:] = [own(item, depth) for item in result]
        elif isinstance(result, dict):
            for key in result:
                result[key] = own(result[key], depth)
        for name, attribute in _attributes(result):
            new = own(attribute, depth)
            if new is not attribute:
                object.__setattr__(result, name, new)  # of a frozen dataclass too
        return result

    return own(batch), tensors


def _says_how(value: Any) -> bool:
    """Whether a value can be copied without going through its pickled form, or a handle in it."""
    kind = type(value)
    if isinstance(value, (tuple, list, MutableMapping)) or dataclasses.is_dataclass(value):
        return True
    pickles = any(
        name in vars(base)
        for base in kind.__mro__ if base is not object
        for name in ("__reduce__", "__reduce_ex__", "__getstate__")
    )  # fmt: skip
    return hasattr(kind, "__copy__") or not (pickles or hasattr(kind, "__del__"))


def _attributes(value: Any) -> list[tuple[str, Any]]:
    own = getattr(value, "__dict__", {})
    slots = [
        name
        for base in type(value).__mro__
        for name in _names(vars(base).get("__slots__", ()))
        if name not in {"__dict__", "__weakref__"} and hasattr(value, name)
    ]
    found = list(own.items()) if isinstance(own, Mapping) else []
    return found + [(name, getattr(value, name)) for name in slots]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
