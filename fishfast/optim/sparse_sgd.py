"""`SGD` over compact parameters: one launch updates the masters and writes the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from fishfast.optim.base import SparseOptimizer
from fishfast.optim.capturable import LEARNING_RATE_DTYPE, place_steps
from fishfast.optim.flat_state import new_tensors
from fishfast.optim.options import number, require_not_negative
from fishfast.optim.step_table import row_dtype
from fishfast.optim.update import Update, learning_rate_on_host, refuse_in_capture

__all__ = ["SGD"]

# csrc/launch.h, structs SgdScalars, SparseSgdRow and SgdPlan.
_SCALARS = [
    *((name, "<f4") for name in ("negative_lr", "momentum", "one_minus_dampening", "weight_decay")),
    *((name, "<f4") for name in ("grad_scale", "grad_sign")),
    *((name, "<i4") for name in ("nesterov", "first_step")),
]


class SGD(SparseOptimizer):
    r"""SGD that touches only the masked weights.

    .. math::
        g &\leftarrow g + \lambda \theta \qquad b \leftarrow \mu b + (1 - \tau) g \qquad
        \theta \leftarrow \theta - \gamma \, (g + \mu b \text{ with nesterov, else } b)

    Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML
    2013), in the form of torch.optim.SGD. Unlike the code that came with the FISH paper, weight
    decay acts on the masked weights only: all others stay bit-identical.

    Args:
        params: ``tuned.parameters()``, or param groups of them.
        lr: learning rate, a number or a tensor.
        momentum: factor of the momentum buffer.
        dampening: dampening of the momentum.
        weight_decay: L2 penalty on the masked weights.
        nesterov: Nesterov momentum; needs momentum > 0 and no dampening.
        maximize: ascend instead of descend.
        foreach: as in torch; ignored, for a step is one launch in any case.
        capturable: count the steps and read a tensor ``lr``, ``found_inf`` and ``grad_scale`` on
            the device: nothing waits for it, and a CUDA graph can hold the step; `step` says how.
        differentiable: must be False.
        fused: ignored as ``foreach`` is.
        backend: ``"auto"``, ``"cuda"``, ``"cpu"`` (compiled) or ``"torch"``.
        check_finite: refuse a step with NaN or infinity in a gradient, by name; waits for the
            device. Under a `torch.amp.GradScaler` overflow is skipped before this is asked.

    Raises:
        ValueError: an option out of range, parameters that are neither compact nor plain fp32, or
            ``capturable`` for parameters that are not on a GPU.
        RuntimeError: a backend asked for by name that cannot run here.

    Note:
        Deterministic. The state per parameter is ``momentum_buffer``, as in torch.optim.SGD, which
        has no ``capturable``: ours asks for it like Adam, since a step that may be captured cannot
        read the learning rate on the host. Meanwhile the state has a ``step`` on the device, which
        tells the first one; ``state_dict()`` leaves it out.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(4, 1)
        >>> tuned = ff.train_only(model, ff.random_mask(model, k=2, seed=0))
        >>> optimizer = ff.SGD(tuned.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _operation = "sparse_sgd"
    _state_names = ("momentum_buffer",)
    _row = row_dtype(_state_names, _SCALARS)
    _plan = np.dtype([("step", "<u8"), ("lr", LEARNING_RATE_DTYPE)])
    _numbers = ("lr", "momentum", "dampening", "weight_decay")
    _former_options = {"nesterov": False, "maximize": False, "capturable": False}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        check_finite: bool = False,
    ) -> None:
        numbers = require_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        numbers["dampening"] = dampening = number("dampening", dampening)
        if nesterov and (numbers["momentum"] <= 0 or dampening != 0):
            raise ValueError(
                "nesterov needs momentum above 0 and dampening 0; got "
                f"momentum={momentum}, dampening={dampening}"
            )
        defaults = {
            **numbers, "nesterov": nesterov, "maximize": maximize, "foreach": foreach,
            "fused": fused, "capturable": capturable, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, defaults, backend, check_finite)

    def _advance(self, updates: list[Update]) -> None:
        """Make the momentum buffer; the first update sets it, which the device must tell."""
        for update in updates:
            if not update.group["capturable"]:
                if "step" in update.state:  # it was until now
                    update.state.update(_as_torch_has_it(update.state))
                    del update.state["step"]
                continue
            if update.group["momentum"] == 0:
                continue
            started = update.state.get("momentum_buffer") is not None
            place_steps([update], start=float(started))
            if not started:
                _make_buffers([update])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as any optimizer here; of a capturable one the host waits for it."""
        saved = super().state_dict()
        saved["state"] = {index: _as_torch_has_it(s) for index, s in saved["state"].items()}
        return saved

    def _update_torch(self, update: Update, grad_scale: float) -> None:
        group, state, values = update.group, update.state, update.values
        grad = update.grad / grad_scale if grad_scale != 1.0 else update.grad
        grad = -grad if group["maximize"] else grad
        if group["weight_decay"] != 0:
            grad = grad.add(values, alpha=group["weight_decay"])
        if group["momentum"] != 0:
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = state["momentum_buffer"] = grad.clone()
            else:
                buffer.mul_(group["momentum"]).add_(grad, alpha=1 - group["dampening"])
            grad = grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        values.add_(grad, alpha=-float(learning_rate_on_host(group)))

    def _used_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._state_names if group["momentum"] != 0 else ()

    def _rows(self, updates: list[Update], grad_scale: float) -> tuple[np.ndarray, list[Tensor]]:
        first_steps = [update.state.get("momentum_buffer") is None for update in updates]
        missing = [
            update
            for update, first_step in zip(updates, first_steps, strict=True)
            if update.group["momentum"] != 0 and first_step
        ]
        if missing:
            _make_buffers(missing)
        rows, held = super()._rows(updates, grad_scale)
        rows["scalars"]["first_step"] = first_steps
        return rows, held

    def _scalars(self, group: dict[str, Any], step: float, grad_scale: float) -> tuple[Any, ...]:
        return _all_scalars(group, -float(learning_rate_on_host(group)), grad_scale)

    def _constant_scalars(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return _all_scalars(group, 0.0, 1.0)


def _as_torch_has_it(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state without step count, and without the buffer that no step has set yet."""
    if "step" not in state:
        return state
    kept = {name: value for name, value in state.items() if name != "step"}
    return kept if float(state["step"]) else {**kept, "momentum_buffer": None}


def _make_buffers(updates: list[Update]) -> None:
    refuse_in_capture("momentum changed")
    buffers = new_tensors([update.plain for update in updates])
    for update, buffer in zip(updates, buffers, strict=True):
        update.state["momentum_buffer"] = buffer


def _all_scalars(group: dict[str, Any], negative_lr: float, grad_scale: float) -> tuple[Any, ...]:
    """Return the numbers of a row in the order of _SCALARS, of any step but the first."""
    sign, first_step = -1.0 if group["maximize"] else 1.0, 0
    return (
        negative_lr, group["momentum"], 1 - group["dampening"], group["weight_decay"],
        grad_scale, sign, group["nesterov"], first_step,
    )  # fmt: skip
