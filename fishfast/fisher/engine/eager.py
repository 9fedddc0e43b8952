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
    Selective ones give out what they have kept once only: here they keep nothing.
    """
    global _num_replacing
    module: Any = torch.utils.checkpoint
    again = functools.partial(module.checkpoint, use_reentrant=False)

    def apply(run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return again(run, *args, preserve_rng_state=preserve_rng_state)

    with _REPLACED:
        if _num_replacing == 0:
            generator = module._checkpoint_without_reentrant_generator
            module._checkpoint_without_reentrant_generator = _with_contexts_again(generator)
        _num_replacing += 1
        module.CheckpointFunction.apply = apply  # shadows the inherited method
    outer, _here.scoring = getattr(_here, "scoring", False), True
    try:
        yield
    finally:
        _here.scoring = outer
        with _REPLACED:
            _num_replacing -= 1
            if _num_replacing == 0:  # not while another thread scores
                del module.CheckpointFunction.apply
                generator = module._checkpoint_without_reentrant_generator.__wrapped__
                module._checkpoint_without_reentrant_generator = generator


def _with_contexts_again(generator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generator)
    def run(
        function: Any, preserve_rng_state: bool, context_fn: Any, *args: Any, **kwargs: Any
    ) -> Any:
        none = context_fn is torch.utils.checkpoint.noop_context_fn
        if not none and getattr(_here, "scoring", False):  # else another thread trains
            context_fn = functools.partial(_contexts, context_fn)
        return generator(function, preserve_rng_state, context_fn, *args, **kwargs)

    return run


def _contexts(context_fn: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return the contexts of a checkpoint's forward and of each time that it runs again."""
    forward, again = context_fn()
    if isinstance(forward, _SELECTIVE):
        return contextlib.nullcontext(), contextlib.nullcontext()
    return forward, _Again(again, context_fn)


class _Again:
    """A context that can be entered any number of times: a new one each time but the first."""

    def __init__(self, first: Any, context_fn: Callable[[], tuple[Any, Any]]) -> None:
        self._first, self._context_fn = [first], context_fn
        self._entered: list[Any] = []

    def __enter__(self) -> Any:
        self._entered.append(self._first.pop() if self._first else self._context_fn()[1])
        return self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._entered.pop().__exit__(*error)
