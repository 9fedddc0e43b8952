"""How everything is measured here: one machine line, one clock per device, counted bytes.

A case is timed with the device's own clock (CUDA events; perf_counter on a CPU), after a warm-up,
with a cold L2 on a GPU, and reported as median with p20 and p80. Bytes are counted from the tensors
and turned into GB/s and into percent of the copy bandwidth that was measured in the same run.
"""

from __future__ import annotations

import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

import fishfast as ff

__all__ = ["copy_bandwidth", "devices", "machine", "measure", "record"]

_WARMUP, _REPEATS = 3, 20
_FLUSH_BYTES = 2**28  # several times the L2 of any card


def devices() -> list[torch.device]:
    """Return where to measure: the GPU if there is one, else the CPU."""
    return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]


@functools.cache
def machine() -> dict[str, Any]:
    """Return what a figure is worth nothing without: machine, driver, versions, commit."""
    gpu = torch.cuda.is_available()
    return {
        "rehearsal": not gpu,  # without a GPU the figures only show that the script runs
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "fishfast": ff.build_info(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measure(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Time ``run`` on its device's clock.

    Args:
        run: what is timed; inputs are built before.
        device: where it runs.

    Returns:
        ``median_us``, ``p20_us`` and ``p80_us``.
    """
    clock = _time_cuda if device.type == "cuda" else _time_cpu
    for _ in range(_WARMUP):
        run()
    times = [clock(run) for _ in range(_REPEATS)]
    quintiles = statistics.quantiles(times, n=5)
    return {"median_us": statistics.median(times), "p20_us": quintiles[0], "p80_us": quintiles[-1]}


def _time_cpu(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - start)


def _time_cuda(run: Callable[[], Any]) -> float:
    torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()  # cold L2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Return GB/s of a large copy, bytes read plus bytes written: every kernel's floor."""
    elements = 2**28 if device.type == "cuda" else 2**24
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device)
    return 8 * elements / timing["median_us"] / 1e3


def record(benchmark: Any, run: Callable[[], Any], device: torch.device, num_bytes: int) -> None:
    """Measure one case and put it into pytest-benchmark's table and JSON.

    Args:
        benchmark: pytest-benchmark's fixture; it times the same call by the wall clock.
        run: what is timed, already shown to be correct.
        device: where it runs.
        num_bytes: what the operation must move at the least.
    """
    timing = measure(run, device)
    gb_per_s = num_bytes / timing["median_us"] / 1e3
    percent = 100 * gb_per_s / copy_bandwidth(device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    benchmark.extra_info.update(
        timing, bytes=num_bytes, gb_per_s=gb_per_s, percent_of_copy=percent, peak_bytes=peak
    )

    def synchronized() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, rounds=5, warmup_rounds=1)
    print(
        f"{benchmark.name:<58} {timing['median_us']:>11.1f} us  {gb_per_s:>8.1f} GB/s  "
        f"{percent:>5.1f} % of copy"
    )
