"""Values, rounded to their weights' dtypes, into the weights: one call for all of a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fishfast import _backend, _tables
from fishfast.training.values.target import Target

__all__ = ["TARGET_DTYPE", "target_row", "write_values"]

# csrc/launch.h, structs ScatterTarget and WriteRow.
TARGET_DTYPE = np.dtype(
    [("weight", "<u8"), ("offsets", "<u8"), ("storage", "<i4"), ("wide_offsets", "<i4")]
)
_ROW_DTYPE = np.dtype([("target", TARGET_DTYPE), ("values", "<u8"), ("k", "<i8")])
_TIME = 4.0  # nanoseconds for an entry
_Place = tuple[Tensor, Target, Tensor]  # values, where they go, and the weight


def target_row(weight: Tensor, offsets: Tensor) -> tuple[int, int, int, bool]:
    """Return a weight as a row's ``target``.

    Args:
        weight: of a dtype that kernels write.
        offsets: where its entries lie in its storage.
    """
    storage, wide = _backend.STORAGE[weight.dtype], offsets.dtype == torch.int64
    return weight.data_ptr(), offsets.data_ptr(), storage, wide


def write_values(places: Sequence[tuple[Tensor, Target]]) -> None:
    """Write values into their weights and nothing else, and remember the weights as they are.

    Args:
        places: fp32 values [k] and where they go.

    Raises:
        RuntimeError: a weight that is gone, has another shape, or is tied in pieces. Nothing was
            written.
    """
    weights = [target.weight() for _, target in places]
    compiled: dict[torch.device, list[_Place]] = {}
    for (values, target), weight in zip(places, weights, strict=True):
        if _is_compiled_for(values, weight):
            compiled.setdefault(weight.device, []).append((values, target, weight))
        else:
            target.scatter_(values)
    for device, written in compiled.items():
        _write_compiled(written, device)
        torch.autograd.graph.increment_version([weight for _, _, weight in written])
        for _, target, weight in written:
            target.mark_seen(weight)


def _is_compiled_for(values: Tensor, weight: Tensor) -> bool:
    return (
        type(values) is Tensor
        and values.device == weight.device
        and values.dtype == torch.float32
        and values.is_contiguous()
        and weight.dtype in _backend.STORAGE
        and _backend.choose("write_values", weight.device) != "torch"
    )


def _write_compiled(places: list[_Place], device: torch.device) -> None:
    rows = np.zeros(len(places), _ROW_DTYPE)
    offsets = [target.offsets(weight) for _, target, weight in places]
    rows["target"] = [
        target_row(weight, where) for where, (_, _, weight) in zip(offsets, places, strict=True)
    ]
    rows["values"] = [values.data_ptr() for values, _, _ in places]
    counts = tuple(values.numel() for values, _, _ in places)
    rows["k"] = counts
    extension = _backend.compiled()
    assert rows.itemsize == extension.WRITE_ROW_BYTES
    if _backend.choose("write_values", device) == "cpu":
        threads = _backend.num_threads(sum(counts) * _TIME)
        extension.write_values_cpu(rows.ctypes.data, len(rows), threads)
    else:  # the stream orders the reuse of what the rows point at after the kernel
        entries = extension.ENTRIES_PER_STEP_CHUNK
        _tables.launch_rows(rows, counts, device, extension.write_values_cuda, entries)
