"""The only place that decides what runs an operation: cuda, triton, cpu (compiled) or torch.

``backend="auto"`` takes the best one that works and says so once when that is not the first
choice; a backend asked for by name that cannot run raises. `build_info` tells the whole story.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fishfast._version import __version__

__all__ = ["STORAGE", "build_info", "choose", "compiled", "num_threads"]

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/storage.h, enum Storage
_START_OF_THREADS = 1e5  # nanoseconds

# What can run each operation on each kind of device, best first.
_PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "fisher": {"cpu": ("cpu", "torch", "triton"), "cuda": ("triton", "torch")},
    "masked_grad": {"cpu": ("cpu", "torch"), "cuda": ("torch",)},
    "topk_mask": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")},
    "write_values": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")},
    "sparse_adam": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")},
    "sparse_sgd": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")},
}
_MIN_TRITON = (3, 6)


def choose(operation: str, device: torch.device, backend: str = "auto") -> str:
    """Return the backend that runs ``operation`` on ``device``.

    Args:
        operation: a key of the preference table, such as ``"sparse_adam"``.
        device: where the tensors are.
        backend: ``"auto"`` or the name of one.

    Returns:
        ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``.

    Raises:
        ValueError: a backend that does not exist for this operation and device.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    candidates = _PREFERENCE[operation].get(device.type, ("torch",))
    if backend != "auto":
        if backend not in candidates:
            raise ValueError(
                f"backend must be 'auto' or one of {candidates} for {operation} on "
                f"{device.type}; got {backend!r}"
            )
        if reason := _why_not(backend, device.type):
            raise RuntimeError(f"backend {backend!r} was asked for but cannot run: {reason}")
        return backend
    first_choice = candidates[0]
    if not (reason := _why_not(first_choice, device.type)):
        return first_choice
    chosen = next(name for name in candidates if not _why_not(name, device.type))
    _warn_once(reason, first_choice, chosen)
    return chosen


@functools.cache
def _warn_once(reason: str, wanted: str, chosen: str) -> None:
    warnings.warn(
        f"fishfast: the {wanted!r} backend is not available ({reason}); {chosen!r} runs instead, "
        "with the same masks and steps to an ulp, but slower. See fishfast.build_info().",
        RuntimeWarning,
        stacklevel=_frames_to_caller(),
    )


def _frames_to_caller() -> int:
    """Return the stack level of the code that called fishfast, for the warning of `_warn_once`."""
    frame, level = sys._getframe(1), 1
    here = str(Path(__file__).parent) + os.sep
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame, level = frame.f_back, level + 1
    return level


@functools.cache
def _extension() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and the reason."""
    try:
        extension = importlib.import_module("fishfast._C")
        built_in, here = Path(str(extension.__file__)).parent, Path(__file__).parent
        if built_in.resolve() != here.resolve():
            # An editable install answers for its own tree when another one is imported.
            return None, f"the compiled extension belongs to another tree, {built_in}"
        return extension, ""
    except ImportError as error:
        if importlib.util.find_spec("fishfast._C") is not None:
            return None, f"the compiled extension fishfast._C does not load: {error}"
        return None, (
            "fishfast._C was not compiled: installed without a C++ compiler, or running from a "
            "source tree that was not installed with pip install -e"
        )


def compiled() -> Any:
    """Return the extension module; call only after `choose` said ``"cpu"`` or ``"cuda"``."""
    return _extension()[0]


@functools.cache
def _why_not(backend: str, device_type: str = "cuda") -> str:
    """Why a backend cannot run for tensors on a kind of device; empty if it can."""
    if backend == "torch":
        return ""
    if backend == "triton":
        return _why_no_triton(device_type)
    extension, reason = _extension()
    if extension is None:
        return reason
    if backend == "cpu":
        return ""
    if extension.build_info()["nvcc"] is None:
        return "fishfast._C was compiled without nvcc"
    count, error = extension.cuda_device_count()
    return "" if count else str(error)


def _why_no_triton(device_type: str) -> str:
    if importlib.util.find_spec("fishfast.kernels") is None:
        return "fishfast.kernels is not installed: running from a source tree"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_TRITON:
        return f"triton {version} is older than {_MIN_TRITON[0]}.{_MIN_TRITON[1]}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""  # kernels run on the CPU, slowly: for tests
    if device_type == "cpu":
        return "it runs on CUDA devices; on the CPU only with TRITON_INTERPRET=1, for tests"
    return "" if torch.cuda.is_available() else "no CUDA device"


def num_threads(nanoseconds: float) -> int:
    """Return how many threads a compiled CPU path uses: torch's own setting, or one.

    Args:
        nanoseconds: about what the work takes on one thread; less than a start of all takes, and
            one does it.
    """
    return torch.get_num_threads() if nanoseconds >= _START_OF_THREADS else 1


def build_info() -> dict[str, Any]:
    """Tell what was compiled, what runs each operation here, and why a backend is off.

    Returns:
        A dict with ``version``, ``torch``, ``extension`` (path of the compiled module or None),
        ``compiler``, ``nvcc``, ``cuda_archs``, ``unavailable`` (backend -> reason) and
        ``operations`` (operation -> device type -> backend that ``"auto"`` takes).

    Example:
        >>> import fishfast as ff
        >>> ff.build_info()["operations"]["sparse_sgd"]["cuda"]
        'torch'
    """
    extension, _ = _extension()
    compiled_with = extension.build_info() if extension else {}
    unavailable = {name: _why_not(name) for name in ("cpu", "cuda", "triton") if _why_not(name)}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "extension": getattr(extension, "__file__", None),
        "compiler": compiled_with.get("compiler"),
        "nvcc": compiled_with.get("nvcc"),
        "cuda_archs": compiled_with.get("cuda_archs"),
        "unavailable": unavailable,
        "operations": {
            operation: {
                kind: next(name for name in names if not _why_not(name, kind))
                for kind, names in by_device.items()
            }
            for operation, by_device in _PREFERENCE.items()
        },
    }
