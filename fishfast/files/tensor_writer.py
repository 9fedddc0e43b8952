"""Writes safetensors files from tensors that come piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fishfast.files.stored_tensors import DTYPES

__all__ = ["Entry", "raw_bytes", "write_tensors"]

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: its name.
        dtype: torch's.
        shape: its shape.
        pieces: its elements in order, flat, on the CPU; read when they are written.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]


def write_tensors(path: Path, entries: list[Entry], metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Args:
        path: the file, overwritten.
        entries: the tensors in the order of the data. Largest items first aligns all of them, which
            readers that map the file into memory need.
        metadata: the header's own entries; none of them, no such part.

    Raises:
        RuntimeError: pieces that do not fill their shape.
    """
    header: dict[str, object] = {}
    if metadata:  # in order: the library reads the entries in another one every time
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for entry in entries:
        start, end = end, end + torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for piece in entry.pieces:
                file.write(raw_bytes(piece))
        if file.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{path} got {file.tell()} bytes instead of {8 + len(text) + end}")


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor in row-major order."""
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # one element of a strided tensor counts as contiguous, not as bytes
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data
