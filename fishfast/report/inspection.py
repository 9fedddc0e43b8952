"""`inspect_file`: what a mask, a delta or a file of scores holds, layer by layer."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from fishfast.delta.delta import Delta, load_delta
from fishfast.files.atomic import PathLike
from fishfast.files.safetensors_file import said_format
from fishfast.files.stored_tensors import open_tensors
from fishfast.fisher.score_files import describe_scores
from fishfast.mask.names import natural
from fishfast.mask.sparse_mask import SparseMask

__all__ = ["Inspection", "Layer", "inspect_file"]


@dataclass(frozen=True)
class Layer:
    """One parameter of a file.

    Attributes:
        name: its name.
        shape: its shape.
        num_params: its number of weights.
        share: what is shown of it: the share of its weights that are selected, in [0, 1], or, of
            scores, their mean per sample.
        num_selected: selected weights; None for scores.
        dtype: of its values in a delta; None where there are none.
        num_zero: scores that are 0; None for masks and deltas.
    """

    name: str
    shape: tuple[int, ...]
    num_params: int
    share: float
    num_selected: int | None = None
    dtype: str | None = None
    num_zero: int | None = None


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        kind: "mask", "delta" or "scores".
        path: the file.
        file_bytes: its size.
        facts: what else is known, by name: numbers, hashes, names.
        layers: its parameters in the order of the model; in natural order where that is lost.
    """

    kind: str
    path: str
    file_bytes: int
    facts: dict[str, Any]
    layers: list[Layer]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self)


def inspect_file(path: PathLike) -> Inspection:
    """Read and check a file that fishfast saved, and say what it holds.

    Scores are read piece by piece: the file may be larger than memory.

    Args:
        path: a mask, a delta or a file of scores.

    Returns:
        What it holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, another version, or a damaged file.

    Example:
        >>> import tempfile, torch, fishfast as ff
        >>> path = tempfile.mkdtemp() + "/mask.safetensors"
        >>> ff.top_k_mask({"w": torch.tensor([3.0, 1.0, 2.0])}, k=2).save(path)
        >>> found = ff.inspect_file(path)
        >>> found.kind, found.layers[0].num_selected
        ('mask', 2)
    """
    metadata = open_tensors(path)[1]
    readers = {
        "fishfast.mask": _of_mask,
        "fishfast.delta": _of_delta,
        "fishfast.fisher": _of_scores,
    }
    if (kind := metadata.get("format")) not in readers:
        raise ValueError(
            f"{os.fspath(path)!r} must be a mask, a delta or scores that fishfast saved; "
            f"{said_format(metadata)}"
        )
    return readers[kind](path)


def _inspection(
    kind: str, path: PathLike, facts: dict[str, Any], layers: list[Layer]
) -> Inspection:
    return Inspection(kind, os.fspath(path), os.stat(path).st_size, facts, layers)


def _of_mask(path: PathLike) -> Inspection:
    mask = SparseMask.load(path)
    facts = {**_size(mask), "num_zero_score": mask.num_zero_score, "fingerprint": mask.fingerprint}
    return _inspection("mask", path, facts, _layers(mask, {}))


def _of_delta(path: PathLike) -> Inspection:
    delta = load_delta(path)
    dtypes = {name: values.dtype for name, values in delta.values.items()}
    facts = {
        **_size(delta.mask),
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}),
        "buffers": sorted(delta.buffers),
        "fingerprint": delta.mask.fingerprint,
        "base_structure": delta.base_structure,
        "base_content": delta.base_content,
        "base_ties": delta.base_ties,
        "dense_bytes": _dense_bytes(delta),
    }
    return _inspection("delta", path, facts, _layers(delta.mask, dtypes))


def _of_scores(path: PathLike) -> Inspection:
    scores, known = describe_scores(path)
    n = sum(score.num_params for score in scores.values())
    facts = {
        "num_params": n,
        "num_zero": sum(score.num_zero for score in scores.values()),
        **{name: known[name] for name in ("fisher_type", "power", "num_samples", "num_batches")},
        "fallback": known["fallback"],
    }
    per_sample = max(1, known["num_samples"])
    layers = [
        Layer(
            name, score.shape, score.num_params,
            score.total / max(1, score.num_params) / per_sample, num_zero=score.num_zero,
        )
        for name, score in scores.items()
    ]  # fmt: skip
    return _inspection("scores", path, facts, layers)


def _size(mask: SparseMask) -> dict[str, Any]:
    return {
        "num_params": mask.num_params,
        "num_selected": mask.num_selected,
        "density": mask.density,
    }


def _layers(mask: SparseMask, dtypes: dict[str, torch.dtype]) -> list[Layer]:
    names = list(mask.shapes)
    if names == sorted(names):  # of scores in a file, not of a model
        names.sort(key=natural)
    shapes = {name: mask.shapes[name] for name in names}
    return [
        Layer(
            name, shape, prod(shape), len(mask[name]) / max(1, prod(shape)), len(mask[name]),
            str(dtypes[name]).removeprefix("torch.") if name in dtypes else None,
        )
        for name, shape in shapes.items()
    ]  # fmt: skip


def _dense_bytes(delta: Delta) -> int:
    """Return the bytes of all scored weights; one without a value counts as the commonest dtype."""
    sizes = {name: values.dtype.itemsize for name, values in delta.values.items()}
    numels = {name: prod(shape) for name, shape in delta.mask.shapes.items()}
    weights: Counter[int] = Counter()
    for name, size in sizes.items():
        weights[size] += numels[name]
    commonest = weights.most_common(1)[0][0] if weights else 4
    return sum(numel * sizes.get(name, commonest) for name, numel in numels.items())
