"""The processes of a test: started, in one gloo group, ended; and how long to wait for any."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

# Seconds after which a process is taken to hang, and for nothing else: what takes seconds on a
# quiet machine may take minutes on a busy one. pytest's own limit, in pyproject.toml, is longer.
HANG_GUARD = 1800


def wait_for(event: Callable[[], object]) -> None:
    """Return once ``event()`` is true."""
    guard = time.monotonic() + HANG_GUARD
    while not event():
        assert time.monotonic() < guard, f"waited {HANG_GUARD} s in vain"
        time.sleep(0.05)


def let_processes_hear_ctrl_c() -> None:
    """Undo what a run in the background (``make test &`` in a script) hands on: SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def start(target: Callable[..., None], count: int, *arguments: Any) -> list[BaseProcess]:
    """Start ``target(rank, *arguments)`` in a process for every rank."""
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=target, args=(rank, *arguments)) for rank in range(count)]
    for worker in workers:
        worker.start()
    return workers


def finish(workers: list[BaseProcess]) -> None:
    """Wait for all, each of which must end well."""
    for worker in workers:
        worker.join(timeout=HANG_GUARD)
        if worker.is_alive():
            worker.terminate()
        assert worker.exitcode == 0


def enter_group(rank: int, count: int, folder: str) -> None:
    """Make this process one of ``count`` that meet in a folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )


def leave_group() -> None:
    """End this process, all others having come as far, without its destructors.

    Gloo's threads may outlive ``destroy_process_group`` where torch still holds the group, as a DDP
    model does, and now and then abort a process that is done.
    """
    dist.barrier()
    os._exit(0)
