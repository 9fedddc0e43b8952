"""Capturable steps: everything that changes between steps is read on the device.

A step is two kernels over tables that stay where they are: the first counts the steps and completes
the rows (learning rate, bias corrections, loss scale, overflow), the second updates. The tables are
uploaded by a step outside a capture and must fit when one is captured, so that a capture records
the two launches and nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishfast import _backend, _tables
from fishfast.optim.flat_state import new_tensors
from fishfast.optim.update import Update, is_capturing, refuse_in_capture

__all__ = [
    "LEARNING_RATE_DTYPE",
    "Tables",
    "learning_rate",
    "place_steps",
    "refuse_devices",
]

# csrc/launch.h, struct LearningRate.
LEARNING_RATE_DTYPE = np.dtype([("tensor", "<u8"), ("value", "<f8"), ("in_float", "<i8")])

_CPU = torch.device("cpu")
_DEVICE_TYPES = ("cuda",)


def refuse_devices(operation: str, device: torch.device, backend: str) -> None:
    """Refuse parameters that no CUDA kernel updates.

    Args:
        operation: ``"sparse_adam"`` or ``"sparse_sgd"``.
        device: where the parameters are.
        backend: as the user gave it.

    Raises:
        ValueError: a device without CUDA graphs, or another backend than ``"cuda"``.
    """
    if device.type not in _DEVICE_TYPES:
        raise ValueError(
            f"capturable must be False for parameters on {device.type}; got True: it needs "
            f"parameters on {' or '.join(_DEVICE_TYPES)}; move the model first"
        )
    chosen = _backend.choose(operation, device, backend)
    if chosen != "cuda":
        raise ValueError(
            f"capturable must be False with the {chosen!r} backend; got True: only the compiled "
            "CUDA step reads nothing on the host; see fishfast.build_info()"
        )


def place_steps(updates: list[Update], start: float = 0.0) -> None:
    """Put step counts where each parameter's kind of step reads it; make those that are missing.

    Args:
        updates: the parameters, on one device.
        start: of a count that is made.
    """
    missing = []
    for update in updates:
        state = update.state
        where = update.values.device if update.group["capturable"] else _CPU
        if "step" not in state:
            refuse_in_capture("a parameter got its first gradient")
            missing.append((state, torch.empty((), device=where)))
        elif state["step"].device != where:
            refuse_in_capture("capturable changed")
            state["step"] = state["step"].to(where)
    if missing:
        made = new_tensors([like for _, like in missing])
        for (state, _), step in zip(missing, made, strict=True):
            state["step"] = step.fill_(start)


def learning_rate(update: Update) -> tuple[int, float, int]:
    """Return the learning rate as the kernel reads it: address or 0, number, fp32 arithmetic.

    Args:
        update: its group has a number, a tensor beside the parameters, or one on the CPU, which is
            a number to a captured step.

    Raises:
        RuntimeError: a tensor of another dtype than float32 and float64, or on another device.
    """
    lr = update.group["lr"]
    if not isinstance(lr, Tensor):
        return 0, float(lr), 0
    device = update.values.device
    if lr.dtype not in (torch.float32, torch.float64) or lr.device not in (device, _CPU):
        raise RuntimeError(
            "lr of a capturable step must be a number, or a float32 or float64 tensor on "
            f"{device}; got {lr.dtype} on {lr.device}"
        )
    in_float = int(lr.dtype == torch.float32)
    return (lr.data_ptr(), 0.0, in_float) if lr.device == device else (0, float(lr), in_float)


class Tables:
    """The tables of one optimizer, on each device those of the last step that needed new ones."""

    def __init__(self) -> None:
        self._present: dict[torch.device, _Table] = {}
        # A graph has the addresses of these, so they live as long as the optimizer, whatever takes
        # their place there. The weights are the model's.
        self._captured: list[Any] = []

    def forget(self) -> None:
        """Let the next step upload: the state is another."""
        self._present = {}

    def launch(
        self,
        operation: str,
        rows: np.ndarray,
        plans: np.ndarray,
        updates: list[Update],
        scaling: tuple[Tensor | None, Tensor | None],
        addressed: list[Tensor],
    ) -> None:
        """Update and scatter all parameters of one device, reading nothing on the host.

        Args:
            operation: ``"sparse_adam"`` or ``"sparse_sgd"``.
            rows: one per update; state and the scalars that do not change filled.
            plans: one per row: what the others are computed from.
            updates: the parameters.
            scaling: ``found_inf`` and ``grad_scale``.
            addressed: tensors that only the rows know of.
        """
        device = updates[0].values.device
        extension = _backend.compiled()
        assert plans.itemsize == getattr(extension, f"{operation.upper()}_PLAN_BYTES")
        held = [_on(device, tensor) for tensor in scaling]
        entries = extension.ENTRIES_PER_STEP_CHUNK
        table = self._table(rows, plans, updates, entries, addressed)
        grads = np.array([update.grad.data_ptr() for update in updates], np.uint64)
        inputs = (grads.ctypes.data, *(0 if t is None else t.data_ptr() for t in held))
        call = getattr(extension, f"{operation}_capturable_cuda")
        _tables.launch_on(device, call, table.addresses, table.sizes, inputs)

    def _table(
        self,
        rows: np.ndarray,
        plans: np.ndarray,
        updates: list[Update],
        entries: int,
        addressed: list[Tensor],
    ) -> _Table:
        device = updates[0].values.device
        present = self._present.get(device)
        capturing = is_capturing()
        layout = [_layout(update) for update in updates]
        if present is None or present.layout != layout:
            refuse_in_capture("parameters, weights or what has a gradient changed")
        rows["grad"] = 0  # comes with the launch
        content = rows.tobytes() + plans.tobytes()
        if present is None or present.layout != layout or present.content != content:
            refuse_in_capture("options or state changed")
            counts = tuple(update.values.numel() for update in updates)
            stream = _tables.present_stream(device)
            chunks = _tables.chunk_table(counts, entries, device, stream)
            present = self._present[device] = _Table(layout, content, rows, plans, chunks)
        if capturing:
            held = [*addressed, *(tensor for update in updates for tensor in update.state.values())]
            held += [update.values.detach() for update in updates]
            self._captured.append((present, held, [update.group["lr"] for update in updates]))
        else:
            present.used_on_present_stream()
        return present


class _Table:
    """What lies on the device, and what it was made from.

    Attributes:
        addresses: of rows, plans and chunks.
        sizes: number of rows and of chunks.
    """

    def __init__(
        self,
        layout: list[Any],
        content: bytes,
        rows: np.ndarray,
        plans: np.ndarray,
        chunks: Tensor,
    ) -> None:
        self.layout, self.content = layout, content
        device = chunks.device
        self._tensors = (*(_tables.to_device(table, device) for table in (rows, plans)), chunks)
        self.addresses = tuple(tensor.data_ptr() for tensor in self._tensors)
        self.sizes = (len(rows), chunks.numel() // _tables.CHUNK_DTYPE.itemsize)

    def used_on_present_stream(self) -> None:
        """Keep the memory from other use until this stream has come here, be it freed before."""
        for tensor in self._tensors:
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _layout(update: Update) -> Any:
    """Return what tells whether a parameter is where it was, without touching the device."""
    weight = update.weight
    where = None if weight is None else (weight.data_ptr(), weight.stride(), weight.dtype)
    return id(update.values), update.plain.data_ptr(), where


def _on(device: torch.device, scaling: Tensor | None) -> Tensor | None:
    return None if scaling is None else scaling.to(device, torch.float32, non_blocking=True)
