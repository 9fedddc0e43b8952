"""The last step's checked rows, kept: the next step only asks whether anything is other than then.

csrc/kept_step.h lists what is asked, once for each tensor and step, in one call. What may differ
from step to step without a "no" is read anew: gradients (or none), step counts, and all options of
the param groups. Anything else, and anything unusual, is checked in full by `SparseOptimizer`, with
the same bits as result.

Not kept, so always checked in full: capturable groups, the torch backend, ``check_finite``,
parameters on several devices, and tensors of a class of their own.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fishfast import _backend
from fishfast.optim.step_table import launch
from fishfast.optim.update import Update
from fishfast.training.gradient.tapped_module import VALUES_SUFFIX, CompactParameter

__all__ = ["KeptStep"]

_Entry = tuple[Any, ...]
_attributes = operator.attrgetter("grad", "_version", "dtype", "shape", "_cdata")
_methods = operator.attrgetter(
    "data_ptr", "numel", "is_contiguous", "is_neg", "stride", "untyped_storage", "get_device"
)
# In the order of the constructor of csrc/kept_step.h.
_QUESTIONS = (
    *_attributes(Tensor), *_methods(Tensor), torch.UntypedStorage._cdata, Tensor, torch.float32,
)  # fmt: skip
_PLAIN_CLASSES = (Tensor, nn.Parameter)


class KeptStep:
    """A step that was checked, taken again for as long as everything is as it was.

    Args:
        optimizer: the `fishfast.optim.base.SparseOptimizer` whose step it was.
        rows: its table.
        updates: its parameters, all on one device.
        held: tensors that the rows have addresses of and nobody else keeps.
        backend: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(
        self,
        optimizer: Any,
        rows: np.ndarray,
        updates: list[Update],
        held: list[Tensor],
        backend: str,
    ) -> None:
        groups = optimizer.param_groups
        self._rows, self._backend = rows, backend
        self._device = updates[0].plain.device
        self._counts = tuple(update.plain.numel() for update in updates)
        self._used_states = [optimizer._used_states(group) for group in groups]
        row_of = {id(update.values): row for row, update in enumerate(updates)}
        entries = tuple(
            _entry(optimizer, parameter, g, row, updates[row] if row >= 0 else None)
            for g, group in enumerate(groups)
            for parameter in group["params"]
            for row in [row_of.get(id(parameter), -1)]
        )
        state = tuple(optimizer.state.items())
        # What csrc/ has addresses and borrowed references of. State is held by tensors of our own:
        # the memory stays, whatever becomes of the user's.
        memory = [
            update.state[name].detach() for update in updates for name in _read(optimizer, update)
        ]
        self._keeps = (entries, state, held, memory)
        fields: Any = rows.dtype.fields
        layout = (
            rows.itemsize, *(fields[name][1] for name in ("grad", "k", "scalars")),
            rows.dtype["scalars"].itemsize,
        )  # fmt: skip
        self._asked = _backend.compiled().KeptStep(
            questions=_QUESTIONS, entries=entries, state=state, rows=rows.ctypes.data,
            layout=layout, device_index=updates[0].plain.get_device(),
        )  # fmt: skip

    @staticmethod
    def fits(optimizer: Any, updates: list[Update]) -> bool:
        """Return whether a step can be kept: no class overrides what is asked of its tensors.

        Args:
            optimizer: whose step it was.
            updates: its parameters.
        """
        if optimizer._check_finite:  # looks at the gradients of each step
            return False
        for update in updates:
            is_masked = update.target is not None
            classes = type(update.values) is CompactParameter, type(update.weight) in _PLAIN_CLASSES
            if not (all(classes) if is_masked else type(update.values) in _PLAIN_CLASSES):
                return False
            if not all(type(update.state[name]) is Tensor for name in _read(optimizer, update)):
                return False
        steps = [update.state["step"] for update in updates if "step" in update.state]
        # csrc/ counts each by itself, in fp32.
        apart = len({step.data_ptr() for step in steps}) == len(steps)
        return apart and all(step.dtype == torch.float32 for step in steps)

    def take(self, optimizer: Any, grad_scale: float) -> bool:
        """Take a step if everything is as it was when this was kept.

        Args:
            optimizer: the same.
            grad_scale: divides the gradients.

        Returns:
            Whether it was taken. If not, nothing was changed.
        """
        groups = optimizer.param_groups
        for group in groups:
            optimizer._refuse_options(group)
        if any(group["capturable"] for group in groups):
            return False
        if [optimizer._used_states(group) for group in groups] != self._used_states:
            return False
        # Nothing that overrides torch's functions has a say in where a tensor's memory is.
        with torch._C.DisableTorchFunction():
            if not self._asked.as_before(state=optimizer.state, groups=groups):
                return False
        try:
            kinds = self._asked.kinds()
            if kinds:
                numbers = [optimizer._scalars(groups[g], step, grad_scale) for g, step in kinds]
                scalars = np.array(numbers, self._rows.dtype["scalars"])
                self._asked.fill(scalars=scalars.ctypes.data)
                launch(optimizer._operation, self._rows, self._counts, self._device, self._backend)
                self._asked.mark_written(torch.autograd.graph.increment_version)
        finally:
            self._asked.let_go()
        return True


def _read(optimizer: Any, update: Update) -> tuple[str, ...]:
    """Return the names of the state that a step reads by address, its count among them."""
    used = optimizer._used_states(update.group)
    return (*used, "step") if "step" in update.state else used


def _entry(
    optimizer: Any, parameter: Tensor, group: int, row: int, update: Update | None
) -> _Entry:
    """Return what csrc/kept_step.h knows of a parameter: objects, and facts about them."""
    target = parameter.target if isinstance(parameter, CompactParameter) else None
    owners = target.owners if target is not None else []
    named = (
        tuple((module.__dict__, name) for module, name in owners),
        _key(owners[0][0]._parameters, owners[0][1] + VALUES_SUFFIX) if owners else None,
        target,
    )
    if update is None:  # without a gradient, which it must be to remain so
        return parameter, group, row, 0, *named, 0, None, None, None, (), 0
    plain, weight, state = update.plain, update.weight, update.state
    facts = None
    if weight is not None and target is not None:
        storage = weight.untyped_storage()._cdata
        facts = (
            _shared(weight.shape), _shared(weight.stride()), weight.dtype, weight.data_ptr(),
            storage, target._seen,
        )  # fmt: skip
    return (
        parameter, group, row, plain.numel(), *named, plain.data_ptr(), weight, facts, state,
        tuple((name, state[name], state[name].data_ptr()) for name in _read(optimizer, update)),
        state["step"].data_ptr() if "step" in state else 0,
    )  # fmt: skip


def _key(mapping: dict[str, Any], name: str) -> str:
    """Return a dict's own key, or the name: to find it by itself compares no text."""
    return next((key for key in mapping if key == name), name)


@functools.lru_cache(maxsize=1024)
def _shared(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return one tuple for all weights of the same sizes, which stays in the caches."""
    return sizes
