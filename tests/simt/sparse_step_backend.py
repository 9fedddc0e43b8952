"""Runs an optimizer of the package as it is, with its CUDA kernel on simulated threads."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from fishfast import _backend, sparse_rows

from .library import SimtLibrary


class SimulatedExtension:
    """Stands in for fishfast._C: the CPU entry runs the CUDA kernel on simulated threads.

    Args:
        real: the extension that it stands in for.
        library: the kernel, with its function ``ff_<operation>``.
        operation: "sparse_adam" or "sparse_sgd".
        row_dtype: of the table that the optimizer hands over.
    """

    def __init__(
        self, real: Any, library: SimtLibrary, operation: str, row_dtype: np.dtype
    ) -> None:
        self.launches = 0
        entries = real.ENTRIES_PER_STEP_CHUNK

        def step(rows: int, num_rows: int, num_threads: int) -> None:
            memory = (ctypes.c_char * (num_rows * row_dtype.itemsize)).from_address(rows)
            table = np.frombuffer(memory, row_dtype)
            counts = tuple(int(k) for k in table["k"])
            chunks = sparse_rows.chunk_table(counts, entries, torch.device("cpu"))
            num_chunks = chunks.numel() // sparse_rows.CHUNK_DTYPE.itemsize
            library.call(f"ff_{operation}", table.view(np.uint8), chunks, num_chunks)
            self.launches += 1

        size = f"{operation.upper()}_ROW_BYTES"
        setattr(self, size, getattr(real, size))
        setattr(self, f"{operation}_cpu", step)


def simulate(
    monkeypatch: pytest.MonkeyPatch, library: SimtLibrary, operation: str, row_dtype: np.dtype
) -> SimulatedExtension:
    """Exchange the extension until the test ends."""
    extension = SimulatedExtension(_backend.compiled(), library, operation, row_dtype)
    monkeypatch.setattr(_backend, "compiled", lambda: extension)
    return extension
