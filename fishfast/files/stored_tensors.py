"""The tensors of a safetensors file, read piece by piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fishfast.files.atomic import PathLike, refuse_no_file

__all__ = ["DTYPES", "StoredTensor", "identity_of", "open_tensors"]

# By their names in a header, as far as the installed torch has them; in the order in which the
# library lays out tensors of several dtypes.
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in (
        ("U64", "uint64"), ("I64", "int64"), ("F64", "float64"), ("C64", "complex64"),
        ("F32", "float32"), ("U32", "uint32"), ("I32", "int32"),
        ("BF16", "bfloat16"), ("F16", "float16"), ("U16", "uint16"), ("I16", "int16"),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz"), ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
        ("F8_E8M0", "float8_e8m0fnu"), ("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"),
        ("I8", "int8"), ("U8", "uint8"), ("BOOL", "bool"),
    )
    if hasattr(torch, name)
}  # fmt: skip
_PIECE_BYTES = 1 << 22


class StoredTensor:
    """One tensor of a file: its shape and dtype now, its data when it is asked for.

    Attributes:
        path: the file.
        shape: as stored.
        dtype: torch's.
        device: the CPU.
    """

    def __init__(
        self, path: str, identity: tuple[int, ...], shape: torch.Size, dtype: torch.dtype,
        offset: int,
    ) -> None:  # fmt: skip
        self.path, self.shape, self.dtype = path, shape, dtype
        self.device = torch.device("cpu")
        self._identity, self._offset = identity, offset

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the data."""
        return self.numel() * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """Read the elements in order, flat.

        Each piece may be written to, and is overwritten by the next one: new memory for each would
        leave holes between what a caller keeps, as many as a large tensor has pieces.

        Yields:
            At most 4 MiB of elements.
        """
        step = _PIECE_BYTES // self.dtype.itemsize
        buffer = torch.empty(min(step, self.numel()), dtype=self.dtype, device="cpu")
        for start in range(0, self.numel(), step):
            piece = buffer[: self.numel() - start]
            self.read_into(piece, start)
            yield piece

    def read(self) -> Tensor:
        """Read all of it."""
        flat = torch.empty(self.numel(), dtype=self.dtype, device="cpu")
        self.read_into(flat, 0)
        return flat.view(self.shape)

    def read_into(self, flat: Tensor, start: int) -> None:
        """Read consecutive elements from the file.

        Args:
            flat: where to; contiguous, of this dtype, on the CPU.
            start: flat index of the first one.

        Raises:
            ValueError: the file is not the one that was opened.
        """
        buffer = flat.view(torch.uint8).numpy().data
        with open(self.path, "rb", buffering=0) as file:
            if identity_of(os.fstat(file.fileno())) != self._identity:
                raise ValueError(f"{self.path!r} has changed since it was opened; open it again")
            file.seek(self._offset + start * flat.element_size())
            filled = 0
            while filled < len(buffer):  # a read may stop early
                got = file.readinto(buffer[filled:])
                if not got:
                    raise ValueError(f"{self.path!r} has become shorter since it was opened")
                filled += got


def identity_of(stat: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def open_tensors(path: PathLike) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Open a safetensors file without reading its data. The file must not change while it is used.

    Args:
        path: the file.

    Returns:
        Name -> tensor in the order of the data, and the header's own entries.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, a name that occurs twice, or a dtype that torch
            does not have.
    """
    text = os.path.abspath(os.fspath(path))
    refuse_no_file(text)
    identity = identity_of(os.stat(text))
    try:
        with safe_open(text, framework="pt") as file:  # refuses what is not whole and consistent
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{text!r} is not a whole safetensors file: {error}") from error
    entries, data_start = _read_header(text)
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{text!r}: the dtype of {name!r} must be one of torch's; it is {entry['dtype']}"
            )
        tensors[name] = StoredTensor(
            text,
            identity,
            torch.Size(entry["shape"]),
            DTYPES[entry["dtype"]],
            data_start + entry["data_offsets"][0],
        )
    return tensors, metadata


def _read_header(path: str) -> tuple[dict[str, Any], int]:
    """Return what safetensors says of each tensor, and where the data starts."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError(f"{path!r} names a tensor twice in its header")
        return dict(pairs)

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length), object_pairs_hook=unique)
    entries.pop("__metadata__", None)
    return entries, 8 + length
