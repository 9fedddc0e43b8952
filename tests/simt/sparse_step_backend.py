"""``backend="simulated"``: an optimizer as it is, with its CUDA kernels on simulated threads.

Exchanged are who is chosen, the extension that is called, how a table and a stream get to the
device, and where a capturable step may run; nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fishfast import _backend, _tables
from fishfast.optim import capturable
from simt.build import CSRC, HERE
from simt.library import SimtLibrary

BACKEND = "simulated"
OPERATIONS = ("sparse_adam", "sparse_sgd", "write_values")
SOURCES = [path for name in OPERATIONS for path in (CSRC / f"{name}.cu", HERE / f"{name}_api.cpp")]


class SimulatedGraph:
    """The launches of a capture, with the arguments they were made with, as a CUDA graph has."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Run them."""
        for launch in self.launches:
            launch()


class SimulatedExtension:
    """Stands in for fishfast._C, with its names.

    Args:
        real: the extension that it stands in for, which still runs ``backend="cpu"``.
        library: the kernels.

    Attributes:
        launches: how many updates ran.
        uploads: how many tables were copied to the device.
    """

    def __init__(self, real: Any, library: SimtLibrary) -> None:
        self._real, self._library = real, library
        self.launches, self.uploads = 0, 0
        self._graph: SimulatedGraph | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _run(self, function: str, *arguments: Any) -> None:
        def launch() -> None:
            self._library.call(function, *arguments)
            self.launches += 1

        launch() if self._graph is None else self._graph.launches.append(launch)

    def _step(self, operation: str, rows: int, chunks: int, num_chunks: int) -> None:
        self._run(f"ff_{operation}", _pointer(rows), _pointer(chunks), num_chunks)

    def _capturable_step(self, operation: str, tables: Any, sizes: Any, inputs: Any) -> None:
        rows, plans, chunks = map(_pointer, tables)
        num_rows, num_chunks = sizes
        # What travels with a launch is copied when it is made.
        memory = (ctypes.c_uint64 * num_rows).from_address(inputs[0])
        grads = np.frombuffer(memory, np.uint64).copy()
        scaling = map(_pointer, inputs[1:])
        self._run(
            f"ff_{operation}_capturable", rows, plans, num_rows, grads, *scaling, chunks, num_chunks
        )

    def sparse_adam_cuda(self, rows: int, chunks: int, num_chunks: int, *_: int) -> None:
        self._step("sparse_adam", rows, chunks, num_chunks)

    def sparse_sgd_cuda(self, rows: int, chunks: int, num_chunks: int, *_: int) -> None:
        self._step("sparse_sgd", rows, chunks, num_chunks)

    def write_values_cuda(self, rows: int, chunks: int, num_chunks: int, *_: int) -> None:
        self._step("write_values", rows, chunks, num_chunks)

    def sparse_adam_capturable_cuda(self, tables: Any, sizes: Any, inputs: Any, *_: int) -> None:
        self._capturable_step("sparse_adam", tables, sizes, inputs)

    def sparse_sgd_capturable_cuda(self, tables: Any, sizes: Any, inputs: Any, *_: int) -> None:
        self._capturable_step("sparse_sgd", tables, sizes, inputs)

    @contextlib.contextmanager
    def capture(self) -> Iterator[SimulatedGraph]:
        """Record launches instead of running them, and tell torch's callers that it does."""
        self._graph = SimulatedGraph()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            try:
                yield self._graph
            finally:
                self._graph = None


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address or None)


def without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launchers be called for tensors of the CPU."""
    monkeypatch.setattr(_tables, "present_stream", lambda device: 0)
    monkeypatch.setattr(_tables, "launch_on", lambda device, call, *given: call(*given, 0, 0))


def install(monkeypatch: pytest.MonkeyPatch, library: SimtLibrary) -> SimulatedExtension:
    """Let ``backend="simulated"`` of the optimizers run the CUDA kernels until the test ends."""
    extension, choose = SimulatedExtension(_backend.compiled(), library), _backend.choose

    def chosen(operation: str, device: torch.device, backend: str = "auto") -> str:
        return "cuda" if backend == BACKEND else choose(operation, device, backend)

    def to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
        extension.uploads += 1
        return torch.from_numpy(rows.copy().view(np.uint8))

    monkeypatch.setattr(_backend, "choose", chosen)
    monkeypatch.setattr(_backend, "compiled", lambda: extension)
    monkeypatch.setattr(_tables, "to_device", to_device)
    without_a_card(monkeypatch)
    monkeypatch.setattr(capturable, "_DEVICE_TYPES", ("cuda", "cpu"))
    return extension
