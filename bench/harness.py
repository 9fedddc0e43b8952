"""How everything is measured here: one machine line, one clock per device, counted bytes.

A case is timed with the device's own clock (CUDA events; perf_counter on a CPU), after a warm-up,
with a cold L2 on a GPU, and reported as median with p20 and p80. Bytes are counted from the tensors
and turned into GB/s and into percent of the copy bandwidth that was measured in the same run.
`compare` times a contender and its floor in turns, so that a busy machine slows both. Peak memory
is what torch's allocators held, on a GPU and on a CPU alike.

Sizes: ``FISHFAST_BENCH=toy`` shows in seconds that everything runs (the default without a GPU, for
CI), ``FISHFAST_BENCH=full`` measures.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fishfast as ff

__all__ = [
    "compare", "copy_bandwidth", "devices", "full_size", "machine", "measure", "peak_bytes",
    "record", "synchronized", "version",
]  # fmt: skip

_WARMUP, _REPEATS = 3, 20
_FEWEST_REPEATS = 3  # of a case that is slow
_FLUSH_BYTES = 2**28  # several times the L2 of any card
# Whose version a figure depends on, beside torch and triton; None: not installed.
_PEERS = ("transformers", "opacus", "backpack-for-pytorch")


def devices() -> list[torch.device]:
    """Return where to measure: the GPU if there is one, else the CPU."""
    return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]


def full_size() -> bool:
    """Return whether to measure at full size; else at a toy size, only to see that it runs."""
    default = "full" if torch.cuda.is_available() else "toy"
    size = os.environ.get("FISHFAST_BENCH", default)
    if size not in ("toy", "full"):
        raise ValueError(f"FISHFAST_BENCH must be 'toy' or 'full'; got {size!r}")
    return size == "full"


@functools.cache
def machine() -> dict[str, Any]:
    """Return what a figure is worth nothing without: machine, driver, versions, commit."""
    gpu = torch.cuda.is_available()
    return {
        "rehearsal": not full_size(),  # toy sizes only show that the script runs
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "peers": {name: version(name) for name in _PEERS},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "fishfast": ff.build_info(),
    }


def version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "cpu"


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
    return _summary(times)


def compare(
    run: Callable[[], Any], floor: Callable[[], Any], device: torch.device, seconds: float = 5.0
) -> dict[str, float]:
    """Time ``run`` and its floor in turns, and take the ratio of each turn.

    Args:
        run: what is timed; inputs are built before.
        floor: what it is held against, on the same inputs.
        device: where both run.
        seconds: about how long to measure, beyond the fewest repeats.

    Returns:
        What `measure` returns, ``floor_us`` (median) and ``times_floor`` (median of the ratios).
    """
    clock = _time_cuda if device.type == "cuda" else _time_cpu
    warmup = clock(floor) + clock(run)
    repeats = int(1e6 * seconds / warmup)
    repeats = max(_FEWEST_REPEATS, min(repeats, _REPEATS))
    if warmup < 1e5:  # as `measure` does; what is slow is warm by now
        for _ in range(_WARMUP - 1):
            floor(), run()
    turns = [(clock(floor), clock(run)) for _ in range(repeats)]
    return {
        **_summary([time for _, time in turns]),
        "floor_us": statistics.median(time for time, _ in turns),
        "times_floor": statistics.median(time / own_floor for own_floor, time in turns),
    }


def _summary(times: list[float]) -> dict[str, float]:
    quintiles = statistics.quantiles(times, n=5, method="inclusive")
    return {"median_us": statistics.median(times), "p20_us": quintiles[0], "p80_us": quintiles[-1]}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that torch's allocator held while ``run`` ran, above those before.

    On a GPU from the caching allocator's counter, on a CPU from the profiler's record of every
    allocation, temporaries inside operators included. Memory that the allocators keep without
    using it, and what libraries take beside torch (oneDNN, MKL), are in neither.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:  # fmt: skip
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Some torch builds write a line to the standard error when the profiler starts and stops."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


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


def synchronized(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Return ``run`` for a wall clock: it ends when the device has."""

    def whole() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return whole


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
    benchmark.pedantic(synchronized(run, device), rounds=5, warmup_rounds=1)
    print(
        f"{benchmark.name:<58} {timing['median_us']:>11.1f} us  {gb_per_s:>8.1f} GB/s  "
        f"{percent:>5.1f} % of copy"
    )
