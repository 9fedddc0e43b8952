"""`AdamW` over compact parameters: one launch updates the masters and writes the weights."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishfast import _backend
from fishfast.sparse_optimizer import TARGET_DTYPE, SparseOptimizer, Update, fill_targets

__all__ = ["AdamW"]

# csrc/launch.h, structs AdamScalars, SparseAdamRow and AdamChunk.
_SCALARS = (
    "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "negative_step_size",
    "bias_correction2_sqrt", "grad_scale", "grad_sign", "padding",
)  # fmt: skip
_ROW_DTYPE = np.dtype(
    [("target", TARGET_DTYPE)]
    + [(name, "<u8") for name in ("grad", "values", "exp_avg", "exp_avg_sq")]
    + [("k", "<i8"), ("scalars", [(name, "<f4") for name in _SCALARS])]
)
_CHUNK_DTYPE = np.dtype([("start", "<i8"), ("row", "<i8")])


class AdamW(SparseOptimizer):
    r"""AdamW that touches only the masked weights.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad
        v_t  = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= (1 - \gamma\lambda)\, \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}
            \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019). Masters and moments
    are fp32; the rounded result is written to the weight in the same launch. Equal, bit for bit, to
    ``torch.optim.AdamW(foreach=False)`` on the CPU where torch's square root is correctly rounded.

    ``weight_decay`` DEFAULTS TO 0, where torch.optim.AdamW has 0.01, and acts on the masked
    weights only: all others stay bit-identical.

    Args:
        params: ``tuned.parameters()``, or param groups of them.
        lr: learning rate, a number or a tensor.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled decay of the masked weights.
        maximize: ascend instead of descend.
        backend: ``"auto"``, ``"cuda"``, ``"cpu"`` (compiled) or ``"torch"``.

    Raises:
        ValueError: an option out of range, or parameters that are neither compact nor plain fp32.
        RuntimeError: a backend asked for by name that cannot run here.

    Note:
        Deterministic. The state per parameter is ``step``, ``exp_avg`` and ``exp_avg_sq``, as in
        torch.optim.AdamW.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(4, 1)
        >>> tuned = ff.train_only(model, ff.random_mask(model, k=2, seed=0))
        >>> optimizer = ff.AdamW(tuned.parameters(), lr=0.1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _operation = "sparse_adam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        for name, value, ok in (
            ("lr", lr, float(lr) >= 0),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not ok:
                raise ValueError(f"{name} must be at least 0; got {value}")
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
            raise TypeError(f"betas must be a pair of numbers; got {betas!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1); got {betas}")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, backend)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of torch.optim.AdamW over the compact parameters.

        Args:
            state_dict: the state.

        Raises:
            ValueError: a state that was saved with ``amsgrad=True``.
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError(
                "amsgrad is not supported; got a state that was saved with amsgrad=True"
            )
        super().load_state_dict(state_dict)

    def _advance(self, updates: list[Update]) -> None:
        for update in updates:
            state = update.state
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(
                        update.values, memory_format=torch.contiguous_format
                    )
        torch._foreach_add_([update.state["step"] for update in updates], 1)

    def _update_torch(self, update: Update, grad_scale: float) -> None:
        state, group = update.state, update.group
        s = _scalars(update, grad_scale)
        grad = update.grad / grad_scale if grad_scale != 1.0 else update.grad
        grad = -grad if group["maximize"] else grad
        state["exp_avg"].lerp_(grad, s["one_minus_beta1"])
        state["exp_avg_sq"].mul_(s["beta2"]).addcmul_(grad, grad, value=s["one_minus_beta2"])
        denominator = (state["exp_avg_sq"].sqrt() / s["bias_correction2_sqrt"]).add_(s["eps"])
        update.values.mul_(s["decay"])
        update.values.addcdiv_(state["exp_avg"], denominator, value=s["negative_step_size"])

    def _update_compiled(
        self, updates: list[Update], grad_scale: float, device: torch.device, backend: str
    ) -> None:
        rows = np.zeros(len(updates), _ROW_DTYPE)
        held = fill_targets(rows, updates)
        for name in ("exp_avg", "exp_avg_sq"):
            rows[name] = [update.state[name].data_ptr() for update in updates]
        scalars: dict[tuple[int, float], tuple[float, ...]] = {}
        keys = [(id(update.group), float(update.state["step"])) for update in updates]
        for key, update in zip(keys, updates, strict=True):
            if key not in scalars:  # a group's parameters have nearly always taken the same steps
                scalars[key] = tuple(_scalars(update, grad_scale).values())
        rows["scalars"] = [scalars[key] for key in keys]

        extension = _backend.compiled()
        assert _ROW_DTYPE.itemsize == extension.SPARSE_ADAM_ROW_BYTES
        if backend == "cpu":
            extension.sparse_adam_cpu(rows.ctypes.data, len(rows), _backend.num_threads())
            return
        counts = tuple(update.values.numel() for update in updates)
        chunks = _chunk_table(counts, extension.ADAM_ENTRIES_PER_CHUNK, device)
        table = torch.from_numpy(rows.view(np.uint8)).pin_memory().to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device).cuda_stream
        num_chunks = chunks.numel() // _CHUNK_DTYPE.itemsize
        extension.sparse_adam_cuda(
            table.data_ptr(), chunks.data_ptr(), num_chunks, chunks.device.index, stream
        )
        del held  # the stream orders their reuse after the kernel


def _scalars(update: Update, grad_scale: float) -> dict[str, float]:
    """The numbers of one parameter's step, in double, in the order of AdamScalars."""
    group, lr = update.group, update.lr()
    beta1, beta2 = group["betas"]
    step = float(update.state["step"])
    return {
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "eps": group["eps"],
        "decay": float(1 - lr * group["weight_decay"]),
        "negative_step_size": -float(lr / (1 - beta1**step)),
        "bias_correction2_sqrt": (1 - beta2**step) ** 0.5,
        "grad_scale": grad_scale,
        "grad_sign": -1.0 if group["maximize"] else 1.0,
        "padding": 0.0,
    }


@functools.lru_cache(maxsize=8)
def _chunk_table(counts: tuple[int, ...], entries: int, device: torch.device) -> Tensor:
    """Which row and entry each block of the CUDA kernel starts at; on the device, made once."""
    table = [(start, row) for row, count in enumerate(counts) for start in range(0, count, entries)]
    return torch.from_numpy(np.array(table, _CHUNK_DTYPE).view(np.uint8)).to(device)
