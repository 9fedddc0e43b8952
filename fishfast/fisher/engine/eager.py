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

__all__ = ["checkpoints_not_reentrant", "not_compiled"]

_REPLACED = threading.Lock()
_num_replacing = 0


def not_compiled() -> contextlib.AbstractContextManager[Any]:
    """Run compiled models eagerly: calls inside a compiled graph cannot be intercepted."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; its import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def checkpoints_not_reentrant() -> Iterator[None]:
    """Run reentrant checkpoints as the other kind: same values, and a graph that can be audited."""
    global _num_replacing
    function = torch.utils.checkpoint.CheckpointFunction
    again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

    def apply(run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return again(run, *args, preserve_rng_state=preserve_rng_state)

    with _REPLACED:
        _num_replacing += 1
        function.apply = apply  # type: ignore[method-assign]  # shadows the inherited method
    try:
        yield
    finally:
        with _REPLACED:
            _num_replacing -= 1
            if _num_replacing == 0:  # not while another thread scores
                del function.apply
