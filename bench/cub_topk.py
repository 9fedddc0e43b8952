"""CUB's DeviceTopK through ctypes: cub_topk.cu, built here by nvcc for the card that is there.

Its headers are in the PyPI package nvidia-cuda-cccl (13.3.5, CCCL 3.5.0, was tried; the CUB of CUDA
13.0 has no DeviceTopK). Installed, it is found; else name the folder that holds ``cub/``:

    pip download --no-deps nvidia-cuda-cccl && unzip -q nvidia_cuda_cccl-*.whl -d cccl
    export FISHFAST_CCCL=$PWD/cccl/nvidia/cu13/include/cccl

A card without network needs that folder brought along. The library is built once, in half a minute,
and kept in bench/out.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import site
import subprocess
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
    """Return why it cannot be built here, or None."""
    if headers() is None:
        return (
            "no CCCL headers with cub/device/device_topk.cuh: install nvidia-cuda-cccl or set "
            "FISHFAST_CCCL"
        )
    if shutil.which("nvcc") is None:
        return "no nvcc on the PATH"
    return None


def cccl_version() -> str:
    """Return the version of the headers, such as "3.5.0"."""
    folder = headers()
    assert folder is not None, unavailable()
    text = (folder / "cuda" / "std" / "__cccl" / "version.h").read_text()
    found = re.search(r"define CCCL_VERSION (\d+)", text)
    assert found, "no CCCL_VERSION in the headers"
    number = int(found[1])
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def build(architecture: str, out: Path = _OUT) -> Path:
    """Compile cub_topk.cu, or return what was compiled before.

    Args:
        architecture: such as "sm_90".
        out: folder of the library.

    Raises:
        RuntimeError: something is missing, or nvcc failed; with its last lines.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    digest = hashlib.sha256(_SOURCE.read_bytes() + cccl_version().encode()).hexdigest()[:12]
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
    """Return the entry of a built library.

    Args:
        library: from `build`.
    """
    entry = ctypes.CDLL(str(library)).fishfast_bench_cub_topk
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    entry.argtypes = [
        ctypes.c_int, pointer, ctypes.POINTER(ctypes.c_size_t), pointer, pointer, pointer, size,
        size, pointer,
    ]  # fmt: skip
    entry.restype = ctypes.c_int
    return entry


@functools.cache
def _entry() -> Any:
    major, minor = torch.cuda.get_device_capability()
    return load(build(f"sm_{major}{minor}"))


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
        error = _entry()(
            kind, workspace, ctypes.byref(num_bytes), scores.data_ptr(), values.data_ptr(),
            indices.data_ptr(), scores.numel(), k, stream,
        )  # fmt: skip
        if error:
            raise RuntimeError(f"cub::DeviceTopK returned CUDA error {error}")

    call(None)
    workspace = torch.empty(num_bytes.value, dtype=torch.uint8, device=scores.device)
    call(workspace.data_ptr())
    return indices
