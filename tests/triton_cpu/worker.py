"""A process in which kernels run under Triton's interpreter, and the tests' end of the line to it.

A call names a function of a module; its tensors travel there with their strides and come back as
the function left them. Uninitialised memory is NaN there.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import pickle
from typing import Any

from processes import HANG_GUARD


class InWorker(RuntimeError):
    """An exception in the worker, with its text."""


class Worker:
    """The tests' end: starts the process, and ends it with the tests."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)  # the child inherits them
        try:
            self.process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        other.close()
        atexit.register(self.process.kill)

    def call(self, module: str, function: str, args: tuple[Any, ...], num_sms: int):
        """Return the result, the arguments as they are after the call, and what was checked."""
        self.line.send_bytes(pickle.dumps((module, function, args, num_sms)))
        if not self.line.poll(HANG_GUARD):
            worker.cache_clear()
            self.process.kill()
            raise InWorker(f"{function} gave no answer in {HANG_GUARD} s: does it end?")
        succeeded, answer = pickle.loads(self.line.recv_bytes())
        if not succeeded:
            raise InWorker(answer)
        return answer


@functools.cache
def worker() -> Worker:
    return Worker()


def _serve(line) -> None:
    import torch

    from triton_cpu import checker, interpreter_bf16

    torch.use_deterministic_algorithms(True)  # also fills what torch.empty makes with NaN
    torch.set_num_threads(1)
    interpreter_bf16.install()
    checker.install()
    while True:
        try:
            request = line.recv_bytes()
        except EOFError:
            return
        try:
            answer = (True, _answer(*pickle.loads(request)))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        line.send_bytes(pickle.dumps(answer))


def _answer(module: str, function: str, args: tuple[Any, ...], num_sms: int):
    from fishfast.kernels import launch

    from triton_cpu import checker

    args = tuple(_aligned(argument) for argument in args)
    launch.num_sms = lambda device: num_sms
    checker.num_checked.update(launches=0, loads=0, stores=0)
    result = getattr(importlib.import_module(module), function)(*args)
    return result, args, dict(checker.num_checked)


def _aligned(argument):
    """Return a tensor in memory of its own: what was unpickled starts at any address."""
    import torch

    if not isinstance(argument, torch.Tensor):
        return argument
    storage = argument.untyped_storage().clone()
    place = argument.storage_offset(), argument.size(), argument.stride()
    return torch.empty(0, dtype=argument.dtype).set_(storage, *place)
