"""Tables of rows: how a step's parameters reach csrc/, all of them in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishfast import _backend, _tables
from fishfast.optim.update import Update
from fishfast.training.values.write_values import TARGET_DTYPE, target_row

__all__ = ["fill_scalars", "launch", "make_rows", "row_dtype"]

_TIME = 8.0  # nanoseconds for an entry, most of them for its weight from memory


def row_dtype(states: tuple[str, ...], scalars: list[tuple[str, str]]) -> np.dtype:
    """Return the record type of one optimizer's rows.

    Args:
        states: names of the state tensors that a row has an address of, 0 for none.
        scalars: names and types of the numbers of a step.
    """
    pointers = [(name, "<u8") for name in ("grad", "values", *states)]
    return np.dtype([("target", TARGET_DTYPE), *pointers, ("k", "<i8"), ("scalars", scalars)])


def make_rows(
    row: np.dtype,
    updates: list[Update],
    used_states: Callable[[dict[str, Any]], tuple[str, ...]],
    state_names: tuple[str, ...],
) -> tuple[np.ndarray, list[Tensor]]:
    """Return the table with all addresses, and tensors to keep until it was read.

    Args:
        row: the record type, from `row_dtype`.
        updates: the parameters.
        used_states: gives the names of the state that a step with a group's options reads.
        state_names: all of them.
    """
    rows = np.zeros(len(updates), row)
    used = {id(update.group): used_states(update.group) for update in updates}
    for name in state_names:
        rows[name] = [
            update.state[name].data_ptr() if name in used[id(update.group)] else 0
            for update in updates
        ]
    return rows, _fill_addresses(rows, updates)


def fill_scalars(
    rows: np.ndarray,
    updates: list[Update],
    scalars_of: Callable[[dict[str, Any], float], tuple[Any, ...]],
    steps: list[float] | None = None,
) -> None:
    """Fill the numbers of a step, computed once per group and step count.

    Args:
        rows: one per update.
        updates: the parameters.
        scalars_of: gives the numbers for a group and a step count.
        steps: how many steps each has taken, if they depend on it.
    """
    known: dict[tuple[int, float], tuple[Any, ...]] = {}
    filled = []
    for update, step in zip(updates, steps or [0.0] * len(updates), strict=True):
        key = (id(update.group), step)
        if key not in known:  # a group's parameters have nearly always taken the same steps
            known[key] = scalars_of(update.group, step)
        filled.append(known[key])
    # Whole columns: numpy takes 5 us to fill one record.
    rows["scalars"] = filled if len(known) > 1 else filled[0]


def launch(
    operation: str, rows: np.ndarray, counts: tuple[int, ...], device: torch.device, backend: str
) -> None:
    """Update and scatter all parameters of one device.

    Args:
        operation: ``"sparse_adam"`` or ``"sparse_sgd"``.
        rows: one per parameter, filled. Those with ``k`` 0 are skipped.
        counts: how many values each row has, or had, at most.
        device: where they are.
        backend: ``"cpu"`` or ``"cuda"``.
    """
    extension = _backend.compiled()
    assert rows.itemsize == getattr(extension, f"{operation.upper()}_ROW_BYTES")
    call = getattr(extension, f"{operation}_{backend}")
    if backend == "cpu":
        call(rows.ctypes.data, len(rows), _backend.num_threads(sum(counts) * _TIME))
        return
    _tables.launch_rows(rows, counts, device, call, extension.ENTRIES_PER_STEP_CHUNK)


def _fill_addresses(rows: np.ndarray, updates: list[Update]) -> list[Tensor]:
    """Fill the columns that all rows have; return tensors to keep until the launch."""
    held: list[Tensor] = []
    targets = []
    for update in updates:
        if update.target is None or update.weight is None:
            targets.append((0, 0, 0, False))
            continue
        offsets = update.target.offsets(update.weight)
        held.append(offsets)
        targets.append(target_row(update.weight, offsets))
    rows["target"] = targets
    rows["grad"] = [update.grad.data_ptr() for update in updates]
    rows["values"] = [update.plain.data_ptr() for update in updates]
    rows["k"] = [update.plain.numel() for update in updates]
    return held
