"""`SGD` over compact parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishfast import _backend
from fishfast.sparse_optimizer import TARGET_DTYPE, SparseOptimizer, Update, fill_targets

__all__ = ["SGD"]

# csrc/launch.h, structs SgdScalars and SparseSgdRow.
_SCALARS = [
    *((name, "<f4") for name in ("negative_lr", "momentum", "one_minus_dampening", "weight_decay")),
    *((name, "<f4") for name in ("grad_scale", "grad_sign")),
    *((name, "<i4") for name in ("nesterov", "first_step")),
]
_ROW_DTYPE = np.dtype(
    [("target", TARGET_DTYPE)]
    + [(name, "<u8") for name in ("grad", "values", "momentum_buffer")]
    + [("k", "<i8"), ("scalars", _SCALARS)]
)


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
        backend: ``"auto"``, ``"cpu"`` (compiled) or ``"torch"``.

    Raises:
        ValueError: an option out of range, or parameters that are neither compact nor plain fp32.
        RuntimeError: a backend asked for by name that cannot run here.

    Note:
        Deterministic. The state per parameter is ``momentum_buffer``, as in torch.optim.SGD.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(4, 1)
        >>> tuned = ff.train_only(model, ff.random_mask(model, k=2, seed=0))
        >>> optimizer = ff.SGD(tuned.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _operation = "sparse_sgd"

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
        backend: str = "auto",
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not float(value) >= 0:
                raise ValueError(f"{name} must be at least 0; got {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                "nesterov needs momentum above 0 and dampening 0; got "
                f"momentum={momentum}, dampening={dampening}"
            )
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, backend)

    def _advance(self, updates: list[Update]) -> None:
        """Nothing to count; the momentum buffer is made by the first update."""

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
        values.add_(grad, alpha=-float(update.lr()))

    def _update_compiled(
        self, updates: list[Update], grad_scale: float, device: torch.device, backend: str
    ) -> None:
        rows = np.zeros(len(updates), _ROW_DTYPE)
        held = fill_targets(rows, updates)
        for row, update in zip(rows, updates, strict=True):
            group, state = update.group, update.state
            first_step = state.get("momentum_buffer") is None
            if group["momentum"] != 0:
                if first_step:
                    state["momentum_buffer"] = torch.empty_like(
                        update.values, memory_format=torch.contiguous_format
                    )
                row["momentum_buffer"] = state["momentum_buffer"].data_ptr()
            row["scalars"] = (
                -float(update.lr()), group["momentum"], 1 - group["dampening"],
                group["weight_decay"], grad_scale, -1.0 if group["maximize"] else 1.0,
                group["nesterov"], first_step,
            )  # fmt: skip
        extension = _backend.compiled()
        assert _ROW_DTYPE.itemsize == extension.SPARSE_SGD_ROW_BYTES
        extension.sparse_sgd_cpu(rows.ctypes.data, len(rows), _backend.num_threads())
        del held
