"""Tables of rows on a CUDA device: how one launch of csrc/ covers many tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHUNK_DTYPE", "chunk_table", "launch_on", "launch_rows", "present_stream", "to_device"]

# csrc/launch.h, struct StepChunk.
CHUNK_DTYPE = np.dtype([("start", "<i8"), ("row", "<i8")])


def to_device(rows: np.ndarray, device: torch.device) -> Tensor:
    """Copy a table; the host does not wait."""
    return torch.from_numpy(rows.view(np.uint8)).pin_memory().to(device, non_blocking=True)


def present_stream(device: torch.device) -> int:
    """Return the present stream of a CUDA device."""
    return torch.cuda.current_stream(device).cuda_stream


def launch_on(device: torch.device, call: Callable[..., None], *arguments: Any) -> None:
    """Call a launcher of csrc/ on a device's present stream.

    Torch's own guard makes the device the current one, if it is not, and goes back to the one
    before only if this process uses that: else a context would take half a gigabyte there.

    Args:
        device: of the tensors.
        call: takes the arguments, the device's index and the stream.
        arguments: what else it takes.
    """
    with torch.cuda.device(device):
        call(*arguments, device.index, present_stream(device))


def launch_rows(
    rows: np.ndarray,
    counts: tuple[int, ...],
    device: torch.device,
    call: Callable[..., None],
    entries: int,
) -> None:
    """Launch blocks that each work on some entries of one row.

    Args:
        rows: the table.
        counts: how many entries each row has, at most.
        device: of the tensors.
        call: takes the addresses of rows and chunks, the number of chunks, device and stream.
        entries: that one block works on.
    """
    chunks = chunk_table(counts, entries, device, present_stream(device))
    table = to_device(rows, device)
    num_chunks = chunks.numel() // CHUNK_DTYPE.itemsize
    launch_on(device, call, table.data_ptr(), chunks.data_ptr(), num_chunks)


@functools.lru_cache(maxsize=8)
def chunk_table(counts: tuple[int, ...], entries: int, device: torch.device, stream: int) -> Tensor:
    """Return which row and entry each block starts at; on the device, made once for each stream.

    Args:
        counts: entries of each row.
        entries: entries that one block updates.
        device: where the blocks run.
        stream: the present one, which reads it: what is forgotten here while another stream still
            read it would be overwritten.
    """
    table = [(start, row) for row, count in enumerate(counts) for start in range(0, count, entries)]
    return torch.from_numpy(np.array(table, CHUNK_DTYPE).view(np.uint8)).to(device)
