"""How everything is measured here: one clock per device, counted bytes, a floor of the same run.

A case passes its correctness gate, or it gets no figure. It is then timed with the device's own
clock (CUDA events; perf_counter on a CPU), after a warm-up, with a cold L2 on a GPU, and reported
as median with p20 and p80. Bytes and FLOPs are counted from the tensors. The floor is what the case
names (one read of the tensor, a plain training step) or a copy of the counted bytes, timed in turns
with it so that a busy machine slows both. Peak memory is what torch's allocators held, on a GPU and
on a CPU alike.

A case calls `record`. Its keywords beyond those listed there are labels, which go into the JSON as
they are; the report wants

    stage       "topk_mask"; default: the file's name without "bench_"
    case        what all compared contenders share; default: the test's other parameters
    contender   "fishfast" is ours; default: the test's parameter of this name
    version     "peft 0.18.0"; default: fishfast's, or torch's
    num_params, num_selected, density, num_tensors, batch, length   what plots have on an axis
    values, dtype, model     what else tells cases apart
    total_bytes   all that training holds at its peak, weights included

and `record` adds ``median_us``, ``p20_us``, ``p80_us``, ``bytes``, ``gb_per_s``, ``flops``,
``tflop_per_s``, ``floor_us``, ``floor_name``, ``times_floor`` (with ``times_floor_p20`` and
``times_floor_p80``), ``percent_of_floor``, ``peak_bytes`` and ``relative_error``. A contender that
cannot run calls `skip`, and the report names it with the reason.

Sizes: ``FISHFAST_BENCH=toy`` shows in seconds that everything runs (the default without a GPU, for
CI), ``full`` measures everything, ``cpu`` what two cores do in minutes, ``gpu`` what a card does.
With ``FISHFAST_BENCH_SECONDS`` the cases for which no time is left are skipped, by name
(conftest.py).
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch
from clock import compare
from floors import copy_of, read_of
from machine import full_size, machine, short_set, version
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "Unavailable", "WrongResult", "compare", "copy_of", "count_flops", "devices", "full_size",
    "gate", "machine", "peak_bytes", "read_of", "record", "short_set", "skip", "version", "why",
]  # fmt: skip


class WrongResult(AssertionError):
    """What was to be timed gave a wrong result: it gets no figure."""


class Unavailable(Exception):
    """A contender that cannot run here, or not on this model; its text says why."""


def why(error: Exception) -> str:
    """Return in a line why something cannot run."""
    text = " ".join(str(error).split())[:160]
    kind = "not installed" if isinstance(error, ImportError) else type(error).__name__
    return f"{kind}: {text}"


def gate(title: str, check: Callable[[], Any]) -> Any:
    """Run a correctness check before anything is timed.

    Args:
        title: what is checked, for the message.
        check: raises AssertionError on a wrong result; may return the relative error.

    Returns:
        What ``check`` returns.

    Raises:
        WrongResult: the check failed.
    """
    try:
        return check()
    except AssertionError as error:
        reason = " ".join(str(error).split()) or "its check failed"
        raise WrongResult(f"{title} is wrong: {reason}; no figure") from error


def skip(reason: str, contender: str, **labels: Any) -> NoReturn:
    """Skip a contender that cannot run here; the report names it with the reason.

    Args:
        reason: such as "needs peft, not installed".
        contender: who.
        labels: as of `record`: ``stage``, ``case`` and parameters.
    """
    skipped_labels[os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0]] = {
        "contender": contender, **labels, "reason": reason,
    }  # fmt: skip
    on = f" on {labels['case']}" if "case" in labels else ""
    pytest.skip(f"{contender}{on}: {reason}")


skipped_labels: dict[str, dict[str, Any]] = {}  # test -> what `skip` was told; conftest.py reads it


def devices() -> list[torch.device]:
    """Return where to measure: the GPU if there is one, else the CPU."""
    return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]


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


def count_flops(run: Callable[[], Any]) -> int:
    """Return the FLOPs of a call's matrix products and convolutions: 2 for each product.

    Fused attention on a CPU is not in torch's count.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


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


def record(
    benchmark: Any,
    run: Callable[[], Any],
    device: torch.device,
    num_bytes: int,
    *,
    flops: int = 0,
    floor: Callable[[], Any] | None = None,
    gate: Callable[[], Any] | None = None,
    **labels: Any,
) -> None:
    """Check one case, measure it, and put it into the JSON and on a line of the output.

    Args:
        benchmark: pytest-benchmark's fixture.
        run: what is timed.
        device: where it runs.
        num_bytes: what the operation must move at the least.
        flops: what it must multiply and add at the least.
        floor: what cannot be beaten, timed in turns with ``run``; None: a copy of ``num_bytes``.
            The label ``floor_name`` says it in words.
        gate: raises AssertionError if ``run`` gives a wrong result, and may return the relative
            error; None: the caller has checked.
        labels: what the report tells cases apart by; see the head of this file.

    Raises:
        WrongResult: the gate was red; nothing is timed, printed or stored.
    """
    title = labels.get("case", benchmark.name)
    contender = labels.get("contender", "")
    if gate is not None:
        error = _gate(f"{contender} on {title}".removeprefix(" on "), gate)
        if isinstance(error, float):
            labels["relative_error"] = error
    labels.setdefault("floor_name", "its floor" if floor else "its bytes, copied")
    figures = _figures(run, device, num_bytes, flops, floor or copy_of(num_bytes, device))
    # In pytest-benchmark's own round: its wall clock is not used.
    figures["peak_bytes"] = benchmark.pedantic(peak_bytes, args=(run, device), rounds=1)
    benchmark.extra_info.update(labels, **figures)
    rate = f"{figures['gb_per_s']:>8.1f} GB/s"
    if flops:
        rate += f"  {figures['tflop_per_s']:>8.3f} TFLOP/s"
    print(
        f"{contender or benchmark.name:<30} {title if contender else '':<44} "
        f"{figures['median_us']:>11.1f} us  {rate}  {figures['percent_of_floor']:>5.1f} % of "
        f"{labels['floor_name']}  {figures['peak_bytes'] / 2**20:>9.1f} MiB held"
    )


_gate = gate  # `record` has an argument of this name


def _figures(
    run: Callable[[], Any],
    device: torch.device,
    num_bytes: int,
    flops: int,
    floor: Callable[[], Any],
) -> dict[str, Any]:
    timing = compare(run, floor, device)
    us = timing["median_us"]
    figures = {**timing, "bytes": num_bytes, "gb_per_s": num_bytes / us / 1e3}
    if flops:
        figures |= {"flops": flops, "tflop_per_s": flops / us / 1e6}
    return figures | {"percent_of_floor": 100 / timing["times_floor"]}
