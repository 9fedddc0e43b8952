"""`top_k_mask(backend="simulated")`: the shipped Python path over the simulated CUDA kernels.

Three seams of the package are exchanged, and nothing else: who is chosen, the extension that is
called, and how a table and a stream get to the device.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fishfast import _backend
from fishfast.topk_mask import select_cuda as module
from simt.build import CSRC, HERE, build
from simt.library import SimtLibrary

SOURCES = [CSRC / "topk_mask.cu", HERE / "topk_mask_api.cpp"]
BACKEND = "simulated"


class SimulatedTopk:
    """Stands in for fishfast._C.

    Args:
        library: The simulated kernels.
        scores_per_tile: Fewer give long chains of tiles at a small n.
        max_blocks: Of a grid; 0 leaves it to the runtime.
        max_shared_bytes: Of a block; 0 is what an H100 has.
        stream_capacity: Scores that may be set aside; None leaves it to the package.
    """

    TOPK_ROW_BYTES = module._ROW_DTYPE.itemsize
    TOPK_PARAMS_BYTES = module._PARAMS_DTYPE.itemsize

    def __init__(
        self,
        library: SimtLibrary,
        *,
        scores_per_tile: int = 8192,
        max_blocks: int = 0,
        max_shared_bytes: int = 0,
        stream_capacity: int | None = None,
    ) -> None:
        self.library = library
        self.TOPK_SCORES_PER_TILE = scores_per_tile
        self._limits = {"max_blocks": max_blocks, "max_shared_bytes": max_shared_bytes}
        if stream_capacity is not None:
            self._limits["stream_capacity"] = stream_capacity
        self.num_calls = 0

    def topk_mask_workspace_bytes(self, params: int) -> int:
        """Set the limits, and ask the C++ code for its bytes."""
        size = module._PARAMS_DTYPE.itemsize
        record = np.frombuffer((ctypes.c_char * size).from_address(params), module._PARAMS_DTYPE)
        for name, value in self._limits.items():
            record[name] = value
        num_bytes = np.zeros(1, np.int64)
        pointer = ctypes.c_void_p(params)
        self.library.call("ff_topk_mask_workspace_bytes", pointer, num_bytes)
        return int(num_bytes[0])

    def topk_mask_cuda(self, params: int, device: int, stream: int) -> None:
        """Run the kernels of one selection."""
        self.library.call("ff_topk_mask", ctypes.c_void_p(params))
        self.num_calls += 1


def install(monkeypatch: pytest.MonkeyPatch, extension: SimulatedTopk) -> None:
    """Let ``backend="simulated"`` of `top_k_mask` call the extension."""
    choose = _backend.choose

    def chosen(operation: str, device: torch.device, backend: str = "auto") -> str:
        return "cuda" if backend == BACKEND else choose(operation, device, backend)

    monkeypatch.setattr(_backend, "choose", chosen)
    monkeypatch.setattr(module, "_backend", SimpleNamespace(compiled=lambda: extension))
    monkeypatch.setattr(
        module, "_to_device", lambda rows, device: torch.from_numpy(rows.view("u1"))
    )
    monkeypatch.setattr(module, "_device_and_stream", lambda device: (0, 0))


def library(folder: Path) -> SimtLibrary:
    """Compile the kernels, once."""
    return SimtLibrary(build(SOURCES, folder / "topk_mask.so"))
