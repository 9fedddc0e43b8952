"""Call the extern "C" functions of a library made by build.py."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np


class SimtLibrary:
    """A shared library of simulated kernels.

    Example::

        lib = SimtLibrary("kernels.so")
        lib.schedule(seed=3, resident_blocks=4)
        lib.call("ff_scale", x, x.size, 0.5)   # int ff_scale(float*, int64_t, double)
    """

    def __init__(self, path: str | Path) -> None:
        self._library = ctypes.CDLL(str(Path(path).resolve()))
        self._library.simt_last_error.restype = ctypes.c_char_p
        self._library.simt_trace.restype = ctypes.c_uint64

    def schedule(
        self,
        *,
        seed: int = 0,
        resident_blocks: int = 1,
        threads: int = 1,
        reverse: bool = False,
    ) -> None:
        """Choose the order in which the CUDA threads of the next launches run.

        Args:
            seed: 0 runs blocks, warps and lanes in order; any other value is a random order, the
                same one each time.
            resident_blocks: How many CUDA blocks are interleaved on each OS thread.
            threads: OS threads. With more than one a run is not repeatable.
            reverse: Start the last block of the grid first.
        """
        self._library.simt_schedule(
            ctypes.c_uint64(seed),
            ctypes.c_int64(resident_blocks),
            ctypes.c_int64(threads),
            ctypes.c_int64(reverse),
        )

    def call(self, name: str, *arguments: Any) -> None:
        """Call an extern "C" function that returns `simt::call(...)`.

        Args:
            name: The function.
            *arguments: NumPy arrays and torch tensors (contiguous) are passed as pointers to their
                data, None as a null pointer, int as int64_t, float as double, str as const char*;
                ctypes values as they are.

        Raises:
            RuntimeError: If the function failed; the text is the runtime's message.
        """
        function = getattr(self._library, name)
        if function(*(_to_ctypes(argument) for argument in arguments)) != 0:
            raise RuntimeError(self._library.simt_last_error().decode())

    @property
    def trace(self) -> int:
        """A hash of which CUDA thread was resumed when, in all launches since `schedule`."""
        return self._library.simt_trace()


def _to_ctypes(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise ValueError(f"arrays must be contiguous; got strides {argument.strides}")
        return ctypes.c_void_p(argument.ctypes.data)
    if hasattr(argument, "data_ptr"):
        if not argument.is_contiguous():
            raise ValueError(f"tensors must be contiguous; got strides {argument.stride()}")
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, str):
        return ctypes.c_char_p(argument.encode())
    if isinstance(argument, (int, np.integer)):
        return ctypes.c_int64(int(argument))
    if isinstance(argument, (float, np.floating)):
        return ctypes.c_double(float(argument))
    return argument
