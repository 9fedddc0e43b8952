"""Has a model run, while it is scored, so that every call is seen: eagerly, checkpoints included.

It knows what torch puts between a model and its calls, and nothing of scores.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint

__all__ = ["checkpoints_run_again", "not_compiled"]

_REPLACED = threading.Lock()
_num_replacing = 0
_here = threading.local()  # `scoring` is set in threads that score
# What selective checkpoints keep is given out once, and a scored graph runs backward several times.
_SELECTIVE = (
    torch.utils.checkpoint._CachingTorchDispatchMode,
    torch.utils.checkpoint._CachedTorchDispatchMode,
)


def not_compiled() -> contextlib.AbstractContextManager[Any]:
    """Run compiled models eagerly: calls inside a compiled graph cannot be intercepted."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; its import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def checkpoints_run_again() -> Iterator[None]:
    """Run checkpoints of torch so that their layers are seen, in any number of backwards.

    Reentrant ones run as the other kind, with the same values and a graph that can be audited.
    Selective ones keep nothing: what they would have kept is computed again.
    """
    global _num_replacing
    function = torch.utils.checkpoint.CheckpointFunction
    again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

    def apply(run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return again(run, *args, preserve_rng_state=preserve_rng_state)

    with _REPLACED:
        if _num_replacing == 0:
            for mode in _SELECTIVE:
                mode.__torch_dispatch__ = _keeping_nothing(mode.__torch_dispatch__)
        _num_replacing += 1
        function.apply = apply  # type: ignore[method-assign]  # shadows the inherited method
    outer, _here.scoring = getattr(_here, "scoring", False), True
    try:
        yield
    finally:
        _here.scoring = outer
        with _REPLACED:
            _num_replacing -= 1
            if _num_replacing == 0:  # not while another thread scores
                del function.apply
                for mode in _SELECTIVE:
                    mode.__torch_dispatch__ = mode.__torch_dispatch__.__wrapped__


def _keeping_nothing(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(dispatch)
    def run(
        mode: Any, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(_here, "scoring", False):
            return func(*args, **(kwargs or {}))
        return dispatch(mode, func, types, args, kwargs)  # another thread's training

    return run
