"""`Adam` and `AdamW` over compact parameters: one launch updates masters, writes weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishfast.optim.base import SparseOptimizer
from fishfast.optim.capturable import LEARNING_RATE_DTYPE, place_steps
from fishfast.optim.flat_state import new_tensors
from fishfast.optim.options import number, require_not_negative
from fishfast.optim.step_table import row_dtype
from fishfast.optim.update import Update, learning_rate_on_host, refuse_in_capture

__all__ = ["Adam", "AdamW"]

# csrc/launch.h, structs AdamScalars, SparseAdamRow and AdamPlan.
_SCALARS = (
    "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "negative_step_size",
    "bias_correction2_sqrt", "grad_scale", "grad_sign", "l2_penalty",
)  # fmt: skip
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_ONE = torch.ones((), device="cpu")


class Adam(SparseOptimizer):
    r"""Adam that touches only the masked weights.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1} \qquad
        m_t  = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad
        v_t  = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}
            \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Kingma and Ba, "Adam: A method for stochastic optimization" (ICLR 2015). Masters and moments are
    fp32; the rounded result is written to the weight in the same launch. Equal, bit for bit, to
    ``torch.optim.Adam(foreach=False)`` on the CPU where torch's square root is correctly rounded.

    ``weight_decay`` is torch.optim.Adam's L2 penalty, on the masked weights only: all others stay
    bit-identical. `AdamW` decouples it from the gradient.

    Args:
        params: ``tuned.parameters()``, or param groups of them.
        lr: learning rate, a number or a tensor.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the denominator.
        weight_decay: factor of the penalty on the masked weights.
        amsgrad: divide by the largest second moment so far (Reddi et al., ICLR 2018).
        foreach: as in torch; ignored, for a step is one launch in any case.
        maximize: ascend instead of descend.
        capturable: count the steps and read a tensor ``lr``, ``found_inf`` and ``grad_scale`` on
            the device: nothing waits for it, and a CUDA graph can hold the step; `step` says how.
        differentiable: must be False.
        fused: ignored as ``foreach`` is.
        decoupled_weight_decay: decay as `AdamW` does.
        backend: ``"auto"``, ``"cuda"``, ``"cpu"`` (compiled) or ``"torch"``.
        check_finite: refuse a step with NaN or infinity in a gradient, by name; waits for the
            device. Under a `torch.amp.GradScaler` overflow is skipped before this is asked.

    Raises:
        ValueError: an option out of range, parameters that are neither compact nor plain fp32, or
            ``capturable`` for parameters that are not on a GPU.
        RuntimeError: a backend asked for by name that cannot run here.

    Note:
        Deterministic. The state per parameter is ``step``, ``exp_avg``, ``exp_avg_sq`` and with
        amsgrad ``max_exp_avg_sq``, as in torch.optim.Adam.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(4, 1)
        >>> tuned = ff.train_only(model, ff.random_mask(model, k=2, seed=0))
        >>> optimizer = ff.Adam(tuned.parameters(), lr=0.1, amsgrad=True)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _operation = "sparse_adam"
    _state_names = _MOMENTS
    _row = row_dtype(_MOMENTS, [(name, "<f4") for name in _SCALARS])
    _plan = np.dtype(
        [("step", "<u8"), ("lr", LEARNING_RATE_DTYPE)]
        + [(name, "<f8") for name in ("beta1", "beta2", "weight_decay")]
    )
    _numbers = ("lr", "eps", "weight_decay")
    _former_options = {
        "amsgrad": False, "maximize": False, "capturable": False, "decoupled_weight_decay": False,
    }  # fmt: skip

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        backend: str = "auto",
        check_finite: bool = False,
    ) -> None:
        defaults = {
            **require_not_negative(lr=lr, eps=eps, weight_decay=weight_decay),
            "betas": _checked_betas(betas), "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "fused": fused,
            "capturable": capturable, "differentiable": differentiable,
            "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, backend, check_finite)

    def _refuse_options(self, group: dict[str, Any]) -> None:
        super()._refuse_options(group)
        group["betas"] = _checked_betas(group["betas"])

    def _advance(self, updates: list[Update]) -> None:
        place_steps(updates)
        for name in _MOMENTS:
            missing = [
                update
                for update in updates
                if name not in update.state and name in self._used_states(update.group)
            ]
            if missing:
                refuse_in_capture("amsgrad changed")
                made = new_tensors([update.plain for update in missing])
                for update, tensor in zip(missing, made, strict=True):
                    update.state[name] = tensor
        counted = [u.state["step"] for u in updates if not u.group["capturable"]]
        if counted:
            # Of a number torch would make a tensor for each of them: four times as long.
            torch._foreach_add_(counted, _ONE, alpha=1.0)

    def _update_torch(self, update: Update, grad_scale: float) -> None:
        state, group, values = update.state, update.group, update.values
        scalars = self._scalars(group, float(state["step"]), grad_scale)
        s = dict(zip(_SCALARS, scalars, strict=True))
        grad = update.grad / grad_scale if grad_scale != 1.0 else update.grad
        grad = -grad if group["maximize"] else grad
        if s["l2_penalty"] != 0:
            grad = grad.add(values, alpha=s["l2_penalty"])
        state["exp_avg"].lerp_(grad, s["one_minus_beta1"])
        state["exp_avg_sq"].mul_(s["beta2"]).addcmul_(grad, grad, value=s["one_minus_beta2"])
        second = state["exp_avg_sq"]
        if group["amsgrad"]:
            largest = state["max_exp_avg_sq"]
            second = torch.maximum(largest, second, out=largest)
        denominator = (second.sqrt() / s["bias_correction2_sqrt"]).add_(s["eps"])
        values.mul_(s["decay"])
        values.addcdiv_(state["exp_avg"], denominator, value=s["negative_step_size"])

    def _used_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return _MOMENTS if group["amsgrad"] else _MOMENTS[:2]

    def _scalars(self, group: dict[str, Any], step: float, grad_scale: float) -> tuple[Any, ...]:
        """Return the numbers of a row; csrc/sparse_adam.h gives a capturable row the same bits."""
        lr, (beta1, beta2) = learning_rate_on_host(group), group["betas"]
        decay = float(1 - lr * group["weight_decay"]) if group["decoupled_weight_decay"] else 1.0
        step_size = -float(lr / (1 - beta1**step))
        return _all_scalars(group, decay, step_size, (1 - beta2**step) ** 0.5, grad_scale)

    def _constant_scalars(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return _all_scalars(group, 0.0, 0.0, 0.0, 1.0)

    def _fill_plans(self, plans: np.ndarray, groups: list[dict[str, Any]]) -> None:
        plans["beta1"], plans["beta2"] = zip(*(group["betas"] for group in groups), strict=True)
        plans["weight_decay"] = [g["weight_decay"] * g["decoupled_weight_decay"] for g in groups]


class AdamW(Adam):
    r"""AdamW that touches only the masked weights.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad
        v_t  = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= (1 - \gamma\lambda)\, \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}
            \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019). Masters and moments
    are fp32; the rounded result is written to the weight in the same launch. Equal, bit for bit, to
    ``torch.optim.AdamW(foreach=False)`` on the CPU where torch's square root is correctly rounded.

    ``weight_decay`` is decoupled, DEFAULTS TO 0, where torch.optim.AdamW has 0.01, and acts on the
    masked weights only: all others stay bit-identical. Every other option, with its default and
    its errors, is that of `Adam`.

    Note:
        Deterministic. The state per parameter is that of `Adam`, as in torch.optim.AdamW.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(4, 1)
        >>> tuned = ff.train_only(model, ff.random_mask(model, k=2, seed=0))
        >>> optimizer = ff.AdamW(tuned.parameters(), lr=0.1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        check_finite: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=True, backend=backend, check_finite=check_finite,
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, copy or load a state, Adam's too: the decay stays decoupled."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


def _checked_betas(betas: Any) -> Any:
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise TypeError(f"betas must be a pair of numbers; got {betas!r}")
    if not (type(betas[0]) is type(betas[1]) is float):
        betas = tuple(number("each of betas", beta) for beta in betas)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1); got {betas}")
    return betas


def _all_scalars(
    group: dict[str, Any], decay: float, step_size: float, correction: float, grad_scale: float
) -> tuple[Any, ...]:
    """Return the numbers of a row in the order of _SCALARS, of which three depend on the step."""
    beta1, beta2 = group["betas"]
    sign = -1.0 if group["maximize"] else 1.0
    l2_penalty = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
    return (
        1 - beta1, beta2, 1 - beta2, group["eps"], decay, step_size, correction, grad_scale, sign,
        l2_penalty,
    )  # fmt: skip
