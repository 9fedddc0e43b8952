"""What a figure is worth nothing without: the machine, its versions, the commit, the date."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fishfast as ff

__all__ = [
    "cpu_seconds", "full_size", "machine", "machine_line", "short_set", "source_hash", "version",
]  # fmt: skip

_ROOT = Path(__file__).resolve().parents[1]
_SETS = ("toy", "cpu", "gpu", "full")
# Whose version a figure depends on, beside torch and triton; None: not installed.
_PEERS = ("transformers", "peft", "opacus", "backpack-for-pytorch")
# What a figure depends on in a checkout: `source_hash` covers it.
_SOURCES = ("csrc", "fishfast", "kernels", "bench")
_SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h"}


def _set() -> str:
    default = "gpu" if torch.cuda.is_available() else "toy"
    name = os.environ.get("FISHFAST_BENCH", default)
    if name not in _SETS:
        raise ValueError(f"FISHFAST_BENCH must be one of {', '.join(_SETS)}; got {name!r}")
    return name


def full_size() -> bool:
    """Return whether to measure; else everything is tiny, only to see that it runs."""
    return _set() != "toy"


def short_set() -> bool:
    """Return whether to measure only what two cores, or one card, do in minutes."""
    return _set() in ("cpu", "gpu")


@functools.cache
def machine() -> dict[str, Any]:
    """Return the machine, its versions, the commit and the date, for the JSON."""
    gpu = torch.cuda.is_available()
    build = ff.build_info()
    build.pop("extension", None)  # a path of this machine
    return {
        "rehearsal": not full_size(),  # toy sizes only show that everything runs
        "set": _set(),
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "cpu": _processor(),
        "os": f"{_distribution()} {platform.machine()}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "peers": {name: version(name) for name in _PEERS},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "source": source_hash(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fishfast": build,
    }


def machine_line(info: dict[str, Any]) -> str:
    """Return the line that heads every table.

    Args:
        info: what `machine` returned, here or on another day; keys it lacks are left out.
    """
    threads = info.get("threads")
    words = [
        str(info.get("device") or "unknown device"),
        f"{threads} thread{'s' * (threads != 1)}" if threads and not info.get("driver") else "",
        *(f"{name} {info[name]}" for name in ("driver", "torch") if info.get(name)),
        f"CUDA {info['cuda']}" if info.get("cuda") else "",
        f"triton {info['triton']}" if info.get("triton") else "",
        f"Python {info['python']}" if info.get("python") else "",
        str(info.get("os") or ""),
        f"commit {info['commit']}" if info.get("commit") else f"source {info.get('source')}",
        str(info.get("date") or "")[:10],
    ]
    return ", ".join(word for word in words if word)


def cpu_seconds() -> tuple[float, float, float]:
    """Return the CPU seconds of all processes (0: unknown), of this one's, and the clock.

    Time that a hypervisor gave to others counts as theirs.
    """
    own = sum(os.times()[:4])
    with contextlib.suppress(OSError, AttributeError, ValueError):
        user, nice, system, _, _, *rest = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        ticks = user + nice + system + sum(rest)  # interrupts and steal
        return ticks / os.sysconf("SC_CLK_TCK"), own, time.monotonic()
    return 0.0, own, time.monotonic()


def version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def source_hash() -> str:
    """Return 12 hex digits of the sources that a figure depends on, with or without git."""
    found = hashlib.sha256()
    files = [f for room in _SOURCES for f in (_ROOT / room).rglob("*") if f.suffix in _SUFFIXES]
    for file in sorted(files):
        found.update(f"{file.relative_to(_ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def _commit() -> str | None:
    """Return the commit, "-dirty" behind it if files were changed.

    A copy without git's folder is told by ``FISHFAST_COMMIT``.
    """
    told = os.environ.get("FISHFAST_COMMIT")
    return told or _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _distribution() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    return platform.system()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "cpu"
