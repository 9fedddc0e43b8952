"""Normalisations whose statistics come from the sample, or are fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.rules.rule import Rule
from fishfast.fisher.engine.uses import SumUse, Use

__all__ = ["BatchNormRule", "GroupNormRule", "InstanceNormRule", "LayerNormRule", "RMSNormRule"]


class LayerNormRule(Rule):
    """``F.layer_norm``."""

    arguments: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")

    def is_exact(self) -> bool:
        """Return whether there is a dim before the normalised ones."""
        return self.x.dim() > len(self.options["normalized_shape"])

    def num_lead(self, x: Tensor) -> int:
        """Return the dims before the normalised ones."""
        return x.dim() - len(self.options["normalized_shape"])

    def forward(self, x: Any, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call, and keep the two statistics of every row."""
        # torch runs the function in fp32 under autocast, which does not know this one.
        self.in_fp32 = torch.is_autocast_enabled(x.device.type)
        if self.in_fp32:
            x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
        out, self.mean, self.rstd = torch.native_layer_norm(
            x, self.options["normalized_shape"], weight, bias, self.options.get("eps", 1e-5)
        )
        return out

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return autograd's own gradient of the input."""
        if self.in_fp32:
            x, grad = x.float(), grad.float()
            weight = None if weight is None else weight.float()
        return torch.ops.aten.native_layer_norm_backward.default(
            grad, x, self.options["normalized_shape"], self.mean, self.rstd, weight, None,
            [True, False, False],
        )[0]  # fmt: skip

    def _statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return mean and 1 / standard deviation, ``[*rows, 1]``."""
        return self.mean, self.rstd

    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return ``sum_t G xhat`` for the weight, ``sum_t G`` for the bias."""
        lead = x.shape[: self.num_lead(x)]
        if index == 1:
            return SumUse(rows, grad.reshape(*lead, -1), self.shape(1))
        mean, rstd = (None if t is None else t.view(*lead, 1) for t in self._statistics(x))
        assert rstd is not None
        factors = (x.reshape(*lead, -1), mean, rstd)
        return SumUse(rows, grad.reshape(*lead, -1), self.shape(0), factors)

    def add_to(
        self, scores: Sequence[Tensor | None], x: Tensor, grad: Tensor, rows: Rows, add: Accumulator
    ) -> None:
        """Add both in one launch where the rows have an order."""
        weight, bias = scores
        if weight is None or weight.dim() > 1 or rows.layout is None:
            super().add_to(scores, x, grad, rows, add)
            return
        mean, rstd = self._statistics(x)
        mean = None if mean is None else rows.blocks(mean)
        add.add_sum(weight, rows.blocks(grad), rows.blocks(x), mean, rows.blocks(rstd), bias)


class RMSNormRule(LayerNormRule):
    """``F.rms_norm``."""

    arguments: tuple[str, ...] = ("input", "normalized_shape", "weight", "eps")

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        return F.rms_norm(x, weight=weight, **self.options)

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return autograd's own gradient of the input."""
        return gradient_by_autograd(lambda x: self.forward(x, weight, None), x, grad)

    def _statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        eps = self.options.get("eps")
        # torch's default is that of the precision in which it computes.
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
        dims = tuple(range(self.num_lead(x), x.dim()))
        return None, torch.rsqrt(x.float().square().mean(dims, keepdim=True) + eps)


class GroupNormRule(Rule):
    """``F.group_norm``."""

    arguments: tuple[str, ...] = ("input", "num_groups", "weight", "bias", "eps")

    def is_exact(self) -> bool:
        """Return whether there are channels behind the batch dim."""
        return self.x.dim() >= 2

    def num_lead(self, x: Tensor) -> int:
        """Return one: the images."""
        return 1

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return autograd's own gradient of the input."""
        return gradient_by_autograd(lambda x: self.forward(x, weight, None), x, grad)

    def _num_groups(self, x: Tensor) -> int:
        return self.options["num_groups"]

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and 1 / standard deviation, ``[B, 1, C]``."""
        groups = self._num_groups(x)
        values = x.float().reshape(len(x), groups, -1)
        var, mean = torch.var_mean(values, -1, correction=0)
        rstd = torch.rsqrt(var + self.options.get("eps", 1e-5))
        width = x.shape[1] // groups
        return tuple(t.repeat_interleave(width, 1).unsqueeze(1) for t in (mean, rstd))  # type: ignore[return-value]

    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return ``sum_l G xhat`` for the weight, ``sum_l G`` for the bias."""
        last = _channels_last(grad)
        if index == 1:
            return SumUse(rows, last, self.shape(1))
        return SumUse(rows, last, self.shape(0), (_channels_last(x), *self._statistics(x)))


class BatchNormRule(GroupNormRule):
    """``F.batch_norm`` with fixed statistics (eval mode), where samples do not mix."""

    arguments: tuple[str, ...] = (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
    )  # fmt: skip

    def is_exact(self) -> bool:
        """Return whether the statistics are the running ones."""
        fixed = self.options.get("running_mean") is not None
        return fixed and not self.options.get("training", False) and self.x.dim() >= 2

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        var = self.options["running_var"].float()
        rstd = torch.rsqrt(var + self.options.get("eps", 1e-5))
        return self.options["running_mean"].float().view(1, 1, -1), rstd.view(1, 1, -1)

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return ``G weight / sqrt(var + eps)``."""
        scale = self._statistics(x)[1].flatten()
        if weight is not None:
            scale = scale * weight
        return grad * scale.view(1, -1, *[1] * (grad.dim() - 2)).to(grad.dtype)


def gradient_by_autograd(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of an input, from a second run of the call."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = run(x)
    return torch.autograd.grad(out, x, grad.to(out.dtype))[0]


class InstanceNormRule(BatchNormRule):
    """``F.instance_norm``: groups of one channel, or in eval mode the running statistics."""

    arguments = (
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum",
        "eps",
    )  # fmt: skip

    def _is_fixed(self) -> bool:
        return not self.options.get("use_input_stats", True)

    def is_exact(self) -> bool:
        """Return whether the input has a batch dim, and no running statistics are changed."""
        changes = not self._is_fixed() and self.options.get("running_mean") is not None
        return not changes and self.x.dim() >= 3

    def _num_groups(self, x: Tensor) -> int:
        return x.shape[1]

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kind = BatchNormRule if self._is_fixed() else GroupNormRule
        return kind._statistics(self, x)

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return autograd's own gradient of the input."""
        return GroupNormRule.input_grad(self, x, weight, grad)


def _channels_last(tensor: Tensor) -> Tensor:
    """Return ``[B, C, *positions]`` as ``[B, L, C]``, a view."""
    return tensor.flatten(2).transpose(1, 2) if tensor.dim() > 2 else tensor.unsqueeze(1)


NORM_RULES: dict[Callable[..., Any], type[Rule]] = {
    F.layer_norm: LayerNormRule,
    F.group_norm: GroupNormRule,
    F.batch_norm: BatchNormRule,
    F.instance_norm: InstanceNormRule,
    F.rms_norm: RMSNormRule,
}
