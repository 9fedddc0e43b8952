"""One parameter's part in a step, checked; and what may not be recorded in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fishfast.compact import CompactParameter
from fishfast.compact_target import Target

__all__ = ["Update", "is_capturing", "refuse_in_capture", "refuse_not_finite"]

# Dtypes that a masked weight may have.
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_capturing() -> bool:
    """Return whether the present stream records a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(what: str) -> None:
    """Refuse to record what a replay must not do.

    Args:
        what: differs from the last step outside the capture.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if is_capturing():
        raise RuntimeError(
            f"step() cannot be captured: {what} since the last step outside the capture; take a "
            "step like the captured one first, on a side stream"
        )


class Update:
    """One parameter's part in a step.

    Attributes:
        values: the compact parameter, or a plain fp32 one.
        grad: its gradient, contiguous.
        state: the optimizer's state of it.
        group: its param group.
        target: where the values go; None for a plain parameter.
        weight: the target's weight.
    """

    __slots__ = ("grad", "group", "state", "target", "values", "weight")

    def __init__(self, values: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        grad = values.grad
        assert grad is not None
        if grad.layout != torch.strided or grad.dtype != torch.float32:
            raise RuntimeError(f"gradients must be dense float32; got {grad.dtype}, {grad.layout}")
        if not values.is_contiguous():
            raise RuntimeError(
                "parameters must be contiguous; got one of shape "
                f"{tuple(values.shape)} and strides {values.stride()}"
            )
        self.values, self.state, self.group = values, state, group
        self.grad = grad.contiguous()
        self.target: Target | None = None
        self.weight: Tensor | None = None
        if isinstance(values, CompactParameter):
            self.target, self.weight = values.target, values.target.weight()
            if self.target.changed(self.weight):
                refuse_in_capture("a weight was written to or replaced")
                values.refresh_()
        if self.weight is not None and self.weight.dtype not in _WEIGHT_DTYPES:
            raise RuntimeError(
                "masked weights must be float32, bfloat16 or float16; the model was moved to "
                f"{self.weight.dtype} after train_only"
            )
        device = values.device
        if self.weight is not None and self.weight.device != device:
            raise RuntimeError(
                f"a masked weight is on {self.weight.device} and its compact parameter on "
                f"{values.device}; move the whole model with model.to()"
            )

        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.device != device:
                raise RuntimeError(
                    f"state must be where its parameter is; got {name!r} on {value.device} and a "
                    f"parameter on {values.device}; make the optimizer after model.to()"
                )

    def lr(self) -> Any:
        """Return the learning rate; one on a GPU costs a synchronisation.

        A tensor stays one: what torch computes from it is rounded to its dtype.
        """
        lr = self.group["lr"]
        return lr.cpu() if isinstance(lr, Tensor) else lr

    def name(self) -> str:
        """Return how to call the parameter in an error: by its weight's name in the model."""
        if self.target is not None:
            return repr(self.target.name)
        position = next(i for i, p in enumerate(self.group["params"]) if p is self.values)
        names = self.group.get("param_names")
        return repr(names[position]) if names else f"number {position} of its param group"


def refuse_not_finite(updates: list[Update]) -> None:
    """Refuse gradients with NaN or infinity in them; one wait for each device.

    Args:
        updates: the parameters of one device.

    Raises:
        RuntimeError: names each parameter whose gradient is not finite.
    """
    finite = torch.stack([update.grad.isfinite().all() for update in updates]).tolist()
    bad = [update.name() for update, fine in zip(updates, finite, strict=True) if not fine]
    if bad:
        raise RuntimeError(
            f"gradients must be finite with check_finite=True; got NaN or infinity for "
            f"{', '.join(bad)}; nothing was changed"
        )
