"""CUB's DeviceTopK through ctypes: cub_topk.cu, built here by nvcc for the card that is there.

Its headers are in the PyPI package nvidia-cuda-cccl (13.3.5, CCCL 3.5.0, was tried; the CUB of CUDA
13.0 has no DeviceTopK). Installed, it is found; else name the folder that holds ``cub/``:

    pip download --no-deps nvidia-cuda-cccl && unzip -q nvidia_cuda_cccl-*.whl -d cccl
    export FISHFAST_CCCL=$PWD/cccl/nvidia/cu13/include/cccl

A card without network needs that folder brought along, or the library itself, built elsewhere:

    python bench/cub_topk.py sm_90 OUT_DIR      # prints its path: export FISHFAST_CUB_TOPK=that

Without it the library is built once, in half a minute, and kept in bench/out.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["build", "cccl_version", "headers", "load", "top_k", "unavailable"]

_SOURCE = Path(__file__).with_name("cub_topk.cu")
_OUT = Path(__file__).with_name("out")


@functools.cache
def headers() -> Path | None:
    """Return the folder of CCCL headers that have DeviceTopK; None if there is none."""
    if named := os.environ.get("FISHFAST_CCCL"):
        folders = [Path(named)]
    else:
        packages = [*site.getsitepackages(), site.getusersitepackages()]
        folders = [f for p in packages for f in sorted(Path(p).glob("nvidia/cu*/include/cccl"))]
    having = [f for f in folders if (f / "cub" / "device" / "device_topk.cuh").is_file()]
    return having[-1] if having else None


def unavailable() -> str | None:
    """Return why it cannot be had here, or None."""
    if named := os.environ.get("FISHFAST_CUB_TOPK"):
        return None if Path(named).is_file() else f"FISHFAST_CUB_TOPK names no file: {named}"
    if headers() is None:
        return (
            "no CCCL headers with cub/device/device_topk.cuh: install nvidia-cuda-cccl or set "
            "FISHFAST_CCCL"
        )
    if shutil.which("nvcc") is None:
        return "no nvcc on the PATH"
    return None


def build(architecture: str, out: Path = _OUT) -> Path:
    """Compile cub_topk.cu, or return what was compiled before, here or elsewhere.

    Args:
        architecture: such as "sm_90".
        out: folder of the library.

    Raises:
        RuntimeError: something is missing, or nvcc failed; with its last lines.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    if named := os.environ.get("FISHFAST_CUB_TOPK"):
        return Path(named)
    version = (headers() or Path()) / "cuda" / "std" / "__cccl" / "version.h"
    digest = hashlib.sha256(_SOURCE.read_bytes() + version.read_bytes()).hexdigest()[:12]
    library = out / f"cub_topk-{architecture}-{digest}.so"
    if library.exists():
        return library
    out.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    command = [
        "nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-shared", "-Xcompiler=-fPIC",
        "-I", str(headers()), str(_SOURCE), "-o", str(partial),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"nvcc failed: {result.stderr[-800:]}")
    partial.replace(library)
    return library


def load(library: Path) -> Any:
    """Return a built library with its signatures.

    Args:
        library: from `build`.
    """
    loaded = ctypes.CDLL(str(library))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.fishfast_bench_cub_topk.argtypes = [
        ctypes.c_int, pointer, ctypes.POINTER(ctypes.c_size_t), pointer, pointer, pointer, size,
        size, pointer,
    ]  # fmt: skip
    return loaded


@functools.cache
def _library() -> Any:
    major, minor = torch.cuda.get_device_capability()
    return load(build(f"sm_{major}{minor}"))


def cccl_version(library: Any = None) -> str:
    """Return the version of the headers that it was built from, such as "3.5.0".

    Args:
        library: from `load`; default: the one for the card.
    """
    number = (library or _library()).fishfast_bench_cccl_version()
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores, in no order, any of equal ones.

    Args:
        scores: [n] fp32 or bf16, contiguous, on the GPU.
        k: how many.

    Returns:
        [k] int32, or int64 where n is 2^31 or more.

    Raises:
        RuntimeError: it cannot be built, or CUDA reported an error.
    """
    wide = scores.numel() >= 2**31
    indices = torch.empty(k, dtype=torch.int64 if wide else torch.int32, device=scores.device)
    values = torch.empty(k, dtype=scores.dtype, device=scores.device)
    stream = torch.cuda.current_stream(scores.device).cuda_stream
    kind = 2 * wide + (scores.dtype == torch.bfloat16)
    num_bytes = ctypes.c_size_t(0)

    def call(workspace: int | None) -> None:
        error = _library().fishfast_bench_cub_topk(
            kind, workspace, ctypes.byref(num_bytes), scores.data_ptr(), values.data_ptr(),
            indices.data_ptr(), scores.numel(), k, stream,
        )  # fmt: skip
        if error:
            raise RuntimeError(f"cub::DeviceTopK returned CUDA error {error}")

    call(None)
    workspace = torch.empty(num_bytes.value, dtype=torch.uint8, device=scores.device)
    call(workspace.data_ptr())
    return indices


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2])))
