"""What a batch asks of a device: launches and waits, counted in calls that torch dispatches.

They are the same on every machine, and on a CPU what they are in front of a GPU, but for the calls
of our own kernels, which are counted where the compiled extension is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fishfast import _backend

__all__ = ["Counts", "counted"]

# Memory, and other names for it.
_NO_LAUNCH = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty",
    "new_empty_strided", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
_NUM_SMS = 132  # an H200's
_KERNELS = (
    "fisher_conv", "fisher_embedding", "fisher_linear", "fisher_linear_rows", "fisher_sum",
    "splits",
)  # fmt: skip
# The host needs the values, or how many there are of them.
_WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_dim",
    "_unique2", "unique_consecutive",
}  # fmt: skip


class Counts(TorchDispatchMode):
    """Counts torch's calls and ours while it is entered.

    Attributes:
        launches: of torch's operations that compute something, by name.
        waits: for the device, by name.
        ours: calls of the compiled extension's kernels, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.ours: Counter[str] = Counter()

    def copy(self) -> Counts:
        """Return the counts so far."""
        return self - Counts()

    def __sub__(self, before: Counts) -> Counts:
        """Return what was counted since."""
        since = Counts()
        for name in ("launches", "waits", "ours"):
            setattr(since, name, getattr(self, name) - getattr(before, name))
        return since

    @property
    def num_launches(self) -> int:
        """All launches, torch's and ours."""
        return self.launches.total() + self.ours.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count a call, and run it."""
        name = func._schema.name.partition("::")[2]
        if name in _WAITS or (name.startswith("index") and _has_mask(args)):
            self.waits[name] += 1
        elif name not in _NO_LAUNCH and not _is_view(func):
            self.launches[name] += 1
        return func(*args, **kwargs or {})


def _is_view(func: Any) -> bool:
    """Whether the result is the memory of an argument, unchanged."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info and not r.alias_info.is_write for r in returns)


def _has_mask(args: Any) -> bool:
    """Whether an index is a mask, whose places are counted first."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(str(getattr(index, "dtype", "")) == "torch.bool" for index in indices)


class _Extension:
    """The compiled extension, with its kernels counted."""

    def __init__(self, counts: Counts) -> None:
        self._counts, self._extension = counts, _backend.compiled()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("fisher_"):
            self._counts.ours[name] += 1
        return getattr(self._extension, name)


class _Kernel:
    """A Triton kernel that is counted and does not run: its arguments need no card."""

    def __init__(self, name: str, counts: Counts) -> None:
        self._name, self._counts = name, counts

    def __getitem__(self, grid: Any) -> Any:
        def launch(**arguments: Any) -> None:
            self._counts.ours[self._name] += 1
            with _disable_current_modes():  # what was there before is no score
                for name in ("out_ptr", "bias_out_ptr"):
                    if isinstance(arguments.get(name), Tensor):
                        arguments[name].zero_()

        return launch


@contextmanager
def counted(card: bool = False) -> Iterator[Counts]:
    """Count what is called inside.

    Args:
        card: as in front of a GPU: the Triton kernels in the place of the compiled ones, counted
            and not run, so that scores are none.

    Yields:
        The counts, complete at the end.
    """
    counts = Counts()
    with contextlib.ExitStack() as stack:
        if card:
            from fishfast.kernels import launch

            stack.enter_context(mock.patch.object(_backend, "choose", return_value="triton"))
            stack.enter_context(mock.patch.object(launch, "num_sms", return_value=_NUM_SMS))
            for name in _KERNELS:
                module = importlib.import_module(f"fishfast.kernels.{name}")
                for kernel in [key for key in vars(module) if key.endswith("_kernel")]:
                    stub = _Kernel(kernel, counts)
                    stack.enter_context(mock.patch.object(module, kernel, stub))
        else:
            extension = _Extension(counts)
            stack.enter_context(mock.patch.object(_backend, "compiled", return_value=extension))
        stack.enter_context(counts)
        yield counts
