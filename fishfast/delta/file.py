"""The file of a delta: its entries, and everything that can be wrong in one. Knows no model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishfast.files.atomic import PathLike
from fishfast.files.safetensors_file import read_checked, write_atomically
from fishfast.mask.sparse_mask import SparseMask, shapes_from_json

__all__ = ["Contents", "read_delta", "refuse_non_finite", "write_delta"]

_FORMAT, _VERSION = "fishfast.delta", 2
_INDICES, _VALUES, _BUFFER = "indices/", "values/", "buffer/"


class Contents(NamedTuple):
    """What the file holds: the arguments of `fishfast.Delta`, where they are described."""

    mask: SparseMask
    values: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    base_structure: str
    base_content: str
    base_ties: Mapping[str, str] | None
    base_others: Sequence[str]


def write_delta(path: PathLike, contents: Contents) -> None:
    """Write the file, atomically.

    Args:
        path: target file; its folder must exist.
        contents: what `read_delta` is to give back.
    """
    mask = contents.mask
    tensors = {_BUFFER + name: buffer for name, buffer in contents.buffers.items()}
    for name, values in contents.values.items():
        tensors[_INDICES + name], tensors[_VALUES + name] = mask[name], values
    metadata = {
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "shapes": json.dumps(mask.shapes),
        "mask_fingerprint": mask.fingerprint,
        "base_structure": contents.base_structure,
        "base_content": contents.base_content,
        "base_ties": json.dumps(contents.base_ties),
        "base_others": json.dumps(contents.base_others),
    }
    write_atomically(path, tensors, metadata)


def read_delta(path: PathLike) -> Contents:
    """Read the file, or refuse it.

    Args:
        path: the file.

    Returns:
        What it holds, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a delta, a newer version, names that occur twice, indices that are out of
            range, unsorted or repeated, values that are missing, of another length or not finite.
    """
    tensors, metadata = read_checked(path, _FORMAT, _VERSION)
    source = repr(os.fspath(path))
    parts: dict[str, dict[str, Tensor]] = {_INDICES: {}, _VALUES: {}, _BUFFER: {}}
    for key, tensor in tensors.items():
        kind = next((kind for kind in parts if key.startswith(kind)), None)
        if kind is None:
            raise ValueError(f"{source} holds {key!r}, which is no part of a delta")
        parts[kind][key[len(kind) :]] = tensor
    indices, values = parts[_INDICES], parts[_VALUES]
    try:
        shapes = shapes_from_json(metadata["shapes"])
        fingerprint = metadata["mask_fingerprint"]
        structure, content = metadata["base_structure"], metadata["base_content"]
        ties, others = json.loads(metadata["base_ties"]), json.loads(metadata["base_others"])
        _check_base_names(ties, others)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} has a broken header: {error!r}") from error
    if unmatched := set(indices) ^ set(values):
        raise ValueError(f"{source} must hold indices and values of the same parameters; got only "
                         f"one of them for {sorted(unmatched)[0]!r}")  # fmt: skip
    for name, found in indices.items():
        if not values[name].is_floating_point():
            raise ValueError(
                f"{source}: values must be floating; {name!r} has {values[name].dtype}"
            )
        if values[name].dim() != 1 or len(values[name]) != found.numel():
            raise ValueError(
                f"{source} holds {found.numel()} indices and {values[name].numel()} values of "
                f"{name!r}"
            )
    for name, tensor in {**values, **parts[_BUFFER]}.items():
        refuse_non_finite(name, tensor, source)
    try:
        mask = SparseMask(indices, shapes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if mask.fingerprint != fingerprint:
        raise ValueError(f"{source} does not match its fingerprint: the file is damaged")
    return Contents(mask, values, parts[_BUFFER], structure, content, ties, others)


def _check_base_names(ties: Any, others: Any) -> None:
    """Raise TypeError where a file's header has something else; it may say anything."""
    if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
        raise TypeError("base_others are no names")
    if ties is not None and not all(isinstance(name, str) for name in ties.values()):
        raise TypeError("base_ties are no names")


def refuse_non_finite(name: str, tensor: Tensor, source: str) -> None:
    """Refuse values that a delta cannot hold.

    Args:
        name: the weight's or buffer's.
        tensor: its values.
        source: where they are, for the message.

    Raises:
        ValueError: a NaN or infinity.
    """
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:  # torch has no isfinite for 8-bit floats
        tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"values must be finite; {name!r} in {source} has NaN or infinity")
