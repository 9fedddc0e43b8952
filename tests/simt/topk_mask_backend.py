"""``backend="simulated"``: the shipped Python path over the simulated CUDA kernels.

Three seams of the package are exchanged, and nothing else: who is chosen, the extension that is
called, and how a table and a stream get to the device.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fishfast import _backend, _tables
from fishfast.mask.selection import cuda as module
from simt.build import CSRC, HERE
from simt.library import SimtLibrary
from simt.sparse_step_backend import without_a_card

BACKEND = "simulated"
SOURCES = [CSRC / "topk_mask.cu", HERE / "topk_mask_api.cpp"]


class SimulatedTopk:
    """Stands in for fishfast._C.

    Args:
        library: The simulated kernels.
        scores_per_tile: Few give long chains of tiles at a small n.
        limits: Fields of TopkParams to set: max_blocks, max_shared_bytes, stream_capacity.
    """

    TOPK_ROW_BYTES = module._ROW_DTYPE.itemsize
    TOPK_PARAMS_BYTES = module._PARAMS_DTYPE.itemsize

    def __init__(self, library: SimtLibrary, scores_per_tile: int = 8192, **limits: int) -> None:
        self.library = library
        self.TOPK_SCORES_PER_TILE = scores_per_tile
        self.limits = limits
        self.num_calls = 0

    def topk_mask_workspace_bytes(self, params: int) -> int:
        """Set the limits, and ask the C++ code."""
        memory = (ctypes.c_char * self.TOPK_PARAMS_BYTES).from_address(params)
        record = np.frombuffer(memory, module._PARAMS_DTYPE)
        for name, value in self.limits.items():
            record[name] = value
        num_bytes = np.zeros(1, np.int64)
        self.library.call("ff_topk_mask_workspace_bytes", ctypes.c_void_p(params), num_bytes)
        return int(num_bytes[0])

    def topk_mask_cuda(self, params: int, device: int, stream: int) -> None:
        """Run the kernels of one selection."""
        self.library.call("ff_topk_mask", ctypes.c_void_p(params))
        self.num_calls += 1


def install(monkeypatch: pytest.MonkeyPatch, extension: SimulatedTopk) -> None:
    """Let ``backend="simulated"`` of `top_k_mask` and `split_mask` call the extension."""
    choose = _backend.choose

    def chosen(operation: str, device: torch.device, backend: str = "auto") -> str:
        return "cuda" if backend == BACKEND else choose(operation, device, backend)

    def to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(rows.view(np.uint8))

    monkeypatch.setattr(_backend, "choose", chosen)
    with_kernels = SimpleNamespace(compiled=lambda: extension, STORAGE=_backend.STORAGE)
    monkeypatch.setattr(module, "_backend", with_kernels)
    monkeypatch.setattr(_tables, "to_device", to_device)
    without_a_card(monkeypatch)
