"""fishfast's CUDA kernels on simulated threads, in the place of its compiled extension."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simt import sparse_step_backend, topk_mask_backend
from simt.build import build
from simt.library import SimtLibrary

from fishfast import _backend

__all__ = ["build_kernels", "install"]

_LIBRARIES = {"steps.so": sparse_step_backend.SOURCES, "topk.so": topk_mask_backend.SOURCES}


def build_kernels(folder: Path) -> None:
    """Compile the kernels.

    Args:
        folder: where to.
    """
    for name, sources in _LIBRARIES.items():
        build(sources, folder / name)


class _Extension(sparse_step_backend.SimulatedExtension):
    """All of the extension: the CPU's part as it is, the rest on simulated threads."""

    def __init__(self, folder: Path) -> None:
        steps, topk = (SimtLibrary(folder / name) for name in _LIBRARIES)
        for library in (steps, topk):
            library.schedule(seed=0)
        super().__init__(_backend.compiled(), steps)
        self._topk = topk_mask_backend.SimulatedTopk(topk)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topk if hasattr(self._topk, name) else self._real, name)


def install(folder: Path) -> None:
    """Let ``"cuda"`` and, in its interpreter, ``"triton"`` run.

    Args:
        folder: of `build_kernels`.
    """
    extension, why_not = _Extension(folder), _backend._why_not

    def why_not_here(backend: str, device_type: str = "cuda") -> str:
        runs = backend == "cuda" or (backend == "triton" and device_type == "cuda")
        return "" if runs else why_not(backend, device_type)

    _backend._why_not = why_not_here  # type: ignore[assignment]
    _backend.compiled = lambda: extension
