"""`SparseMask`: which weights of a model are trained."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fishfast._wrappers import unwrapped
from fishfast.files.atomic import PathLike
from fishfast.files.safetensors_file import read_checked, write_atomically

__all__ = ["SparseMask"]

_FORMAT, _VERSION = "fishfast.mask", 1


class SparseMask(Mapping[str, Tensor]):
    """A fixed mask: parameter name -> ascending flat indices of the selected weights.

    Every scored parameter is a key; one without a selected weight has empty indices. Indices are
    int32, or int64 for a parameter of 2**31 weights or more, and count in row-major order of the
    parameter's shape. Masks are equal when they select the same weights of the same shapes.

    Args:
        indices: name -> ascending, unique flat indices; copied.
        shapes: name -> shape of the parameter, for every scored parameter.
        num_zero_score: how many of the selected weights had score 0, where that is known.

    Attributes:
        shapes: name -> shape.
        num_zero_score: as given.

    Raises:
        ValueError: indices that do not fit their shape, or a shape that is none.

    Example:
        >>> import torch, fishfast as ff
        >>> mask = ff.top_k_mask({"w": torch.tensor([[3.0, 1.0], [2.0, 0.0]])}, k=2)
        >>> mask["w"]
        tensor([0, 2], dtype=torch.int32)
        >>> mask
        SparseMask(2 of 4 weights in 1 of 1 tensors, density 50%, fingerprint 7cb772f5)
    """

    def __init__(
        self,
        indices: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        num_zero_score: int | None = None,
    ) -> None:
        if unknown := set(indices) - set(shapes):
            raise ValueError(
                f"shapes must name every parameter of indices; missing {sorted(unknown)}"
            )
        self.shapes = {name: _checked_shape(name, shape) for name, shape in shapes.items()}
        self._indices: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            found = indices.get(name, torch.empty(0, dtype=torch.int32, device="cpu"))
            _check_indices(name, found, prod(shape))
            self._indices[name] = found.to(index_dtype(prod(shape)), copy=True)
        self.num_zero_score = num_zero_score

    @classmethod
    def _adopt(
        cls,
        indices: dict[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        num_zero_score: int | None,
    ) -> SparseMask:
        """Return a mask of indices that a selection made for it, for every shape.

        They are right by construction and nobody else's: neither checked nor copied, as both would
        take memory of the size of the mask, and on a GPU a wait for each tensor.
        """
        mask = cls({}, {}, num_zero_score)
        mask.shapes = dict(shapes)
        mask._indices = indices
        return mask

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the indices as arrays, with their devices.

        They are slices of one buffer, which pickle would write once for each tensor; and tensors
        that are made for a pickle are gone before a process that is being spawned can map them.

        Returns:
            The attributes.
        """
        arrays = {name: (i.cpu().numpy().copy(), str(i.device)) for name, i in self.items()}
        return {**self.__dict__, "_indices": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the arrays back as tensors."""
        arrays = state.pop("_indices")
        self._indices = {name: torch.from_numpy(a).to(on) for name, (a, on) in arrays.items()}
        self.__dict__.update(state)

    def __getitem__(self, name: str) -> Tensor:
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SparseMask) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        touched = sum(len(found) > 0 for found in self.values())
        return (
            f"SparseMask({self.num_selected:,} of {self.num_params:,} weights in {touched} of "
            f"{len(self)} tensors, density {100 * self.density:.3g}%, "
            f"fingerprint {self.fingerprint[:8]})"
        )

    @property
    def num_params(self) -> int:
        """Number of scored weights, n."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def num_selected(self) -> int:
        """Number of selected weights, k."""
        return sum(len(found) for found in self.values())

    @property
    def density(self) -> float:
        """Share of selected weights, k / n."""
        return self.num_selected / self.num_params if self.num_params else 0.0

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes and indices: the same on every device and in every process.

        The order of the parameters does not enter.
        """
        digest = hashlib.sha256()
        for name, found in sorted(self.items()):
            digest.update(json.dumps([name, self.shapes[name], len(found)]).encode())
            digest.update(found.detach().cpu().to(torch.int64).numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """Return a table of the selected weights, parameter by parameter."""
        rows: list[tuple[Any, ...]] = [
            (name, "x".join(map(str, shape)) or "scalar", f"{len(self[name]):,}",
             f"{100 * len(self[name]) / max(1, prod(shape)):.3f}")
            for name, shape in self.shapes.items()
        ]  # fmt: skip
        rows.append(
            ("total", f"{self.num_params:,}", f"{self.num_selected:,}", f"{100 * self.density:.3f}")
        )
        return tabulate(
            rows,
            headers=("parameter", "shape", "selected", "density %"),
            colalign=("left", "right", "right", "right"),
            disable_numparse=True,
        )

    def save(self, path: PathLike) -> None:
        """Write the mask to a safetensors file, atomically."""
        metadata = {
            "format": _FORMAT,
            "format_version": str(_VERSION),
            "shapes": json.dumps(self.shapes),
            "fingerprint": self.fingerprint,
            "num_zero_score": json.dumps(self.num_zero_score),
        }
        write_atomically(path, self, metadata)

    @classmethod
    def load(cls, path: PathLike) -> SparseMask:
        """Read a mask that `save` wrote.

        Args:
            path: the file.

        Returns:
            The mask, on the CPU.

        Raises:
            ValueError: another kind of file, a newer version, indices that are out of range,
                unsorted or repeated, or contents that do not have the recorded fingerprint.
        """
        tensors, metadata = read_checked(path, _FORMAT, _VERSION)
        try:
            shapes = shapes_from_json(metadata["shapes"])
            num_zero_score = json.loads(metadata["num_zero_score"])
            if num_zero_score is not None and operator.index(num_zero_score) < 0:
                raise ValueError(f"num_zero_score is {num_zero_score}")
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)!r} has a broken header: {error!r}") from error
        mask = cls(tensors, shapes, num_zero_score)
        if mask.fingerprint != metadata.get("fingerprint"):
            raise ValueError(
                f"{os.fspath(path)!r} does not match its fingerprint: the file is damaged"
            )
        return mask

    def check_fits(self, model: nn.Module, *, selected_only: bool = False) -> None:
        """Refuse a model that does not have the mask's parameters.

        Args:
            model: the model to be masked.
            selected_only: ask only for parameters with selected weights.

        Raises:
            ValueError: a parameter that is missing or has another shape.
        """
        parameters = dict(unwrapped(model).named_parameters())
        for name, shape in self.shapes.items():
            if selected_only and len(self[name]) == 0:
                continue
            if name not in parameters:
                raise ValueError(
                    f"mask must fit the model; it names {name!r}, which the model does not have"
                    + _computed_instead(name, parameters)
                )
            if tuple(parameters[name].shape) != shape:
                raise ValueError(
                    f"mask must fit the model; {name!r} has shape {shape} in the mask and "
                    f"{tuple(parameters[name].shape)} in the model"
                )


def _computed_instead(name: str, parameters: Collection[str]) -> str:
    """Say where torch's pruning or parametrizations have put a weight."""
    module, _, own = name.rpartition(".")
    inside = f"{module}.parametrizations.{own}.".removeprefix(".")
    for other, what in (
        (f"{name}_orig", "torch.nn.utils.prune.remove"),
        (f"{inside}original", "torch.nn.utils.parametrize.remove_parametrizations"),
        (f"{inside}original0", "torch.nn.utils.parametrize.remove_parametrizations"),
    ):
        if other in parameters:
            return f", but computes from {other!r}; make the mask of this model, or call {what}"
    return ""


def shapes_from_json(text: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a file's header has; ValueError or TypeError if they are none."""
    entries = json.loads(text, object_pairs_hook=_unique)
    return {name: _checked_shape(name, shape) for name, shape in entries.items()}


def _checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple; what comes from a file may be anything."""
    whole = isinstance(shape, (tuple, list)) and all(
        hasattr(size, "__index__") and not isinstance(size, bool) and size >= 0 for size in shape
    )
    if not whole:
        raise ValueError(f"the shape of {name!r} must be whole numbers >= 0; got {shape!r}")
    return tuple(operator.index(size) for size in shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a JSON object that names an entry twice; json keeps the last one."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("an entry occurs twice")
    return entries


def _check_indices(name: str, indices: Tensor, numel: int) -> None:
    """Refuse indices that are not ascending, unique, integer and within a tensor of ``numel``."""
    problem = ""
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        problem = (
            f"are {indices.dtype} of shape {tuple(indices.shape)}, not a vector of int32 or int64"
        )
    elif len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= numel):
        problem = f"reach from {int(indices.min())} to {int(indices.max())} in a tensor of {numel}"
    elif len(indices) > 1 and not bool((indices[1:] > indices[:-1]).all()):
        problem = "are not strictly ascending"
    if problem:
        raise ValueError(f"mask: the indices of {name!r} {problem}")


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of flat indices into a tensor of ``numel`` elements."""
    return torch.int64 if numel >= 2**31 else torch.int32
