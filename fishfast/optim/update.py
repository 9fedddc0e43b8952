"""One parameter's part in a step, checked; and what may not be recorded in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fishfast import _backend
from fishfast.training.gradient.tapped_module import CompactParameter
from fishfast.training.values.target import Target

__all__ = [
    "Update",
    "count_versions",
    "is_capturing",
    "learning_rate_on_host",
    "refuse_in_capture",
    "refuse_not_finite",
]


def is_capturing() -> bool:
    """Return whether the present stream records a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def learning_rate_on_host(group: dict[str, Any]) -> Any:
    """Return the learning rate of a group; one on a GPU costs a synchronisation.

    A tensor stays one: what torch computes from it is rounded to its dtype.
    """
    lr = group["lr"]
    return lr.cpu() if isinstance(lr, Tensor) else lr


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
        plain: the same memory, for a compact parameter as a `torch.Tensor`.
        grad: its gradient, contiguous; without one the values, in a step that will not update them.
        state: the optimizer's state of it.
        group: its param group.
        target: where the values go; None for a plain parameter.
        weight: the target's weight.
        is_stale: the weight was replaced or written to since the values were in it.

    Args:
        values: becomes the attribute; so do ``state`` and ``group``.
        state: the optimizer's, of this parameter.
        group: its param group.
        state_names: of the state that kernels read by address, which must fit the values.
    """

    __slots__ = ("grad", "group", "is_stale", "plain", "state", "target", "values", "weight")

    def __init__(
        self,
        values: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        state_names: tuple[str, ...],
    ) -> None:
        grad = values.detach() if values.grad is None else values.grad
        if grad.layout != torch.strided or grad.dtype != torch.float32:
            raise RuntimeError(f"gradients must be dense float32; got {grad.dtype}, {grad.layout}")
        plain: Tensor = values
        target: Target | None = None
        self.is_stale = False
        if isinstance(values, CompactParameter):
            plain, target = values.plain, values.target
            if plain._version != values.agreed:
                plain = values.plain = _refuse_other_form(values)
        if not plain.is_contiguous():
            raise RuntimeError(
                "parameters must be contiguous; got one of shape "
                f"{tuple(values.shape)} and strides {values.stride()}"
            )
        self.values, self.plain, self.state, self.group = values, plain, state, group
        self.grad = grad.resolve_neg().contiguous()  # read by address
        self.target = target
        self.weight: Tensor | None = None
        device = plain.device
        if target is not None:
            self.weight = weight = target.weight()
            if weight.dtype not in _backend.STORAGE:
                raise RuntimeError(
                    "masked weights must be float32, bfloat16 or float16; the model was moved to "
                    f"{weight.dtype} after train_only"
                )
            if weight.device != device:
                raise RuntimeError(
                    f"a masked weight is on {weight.device} and its compact parameter on "
                    f"{device}; move the whole model with model.to()"
                )
            self.is_stale = target.changed(weight)
            if self.is_stale:
                refuse_in_capture("a weight was written to or replaced")

        k = plain.numel()
        if grad.device != device:
            raise RuntimeError(
                f"gradients must be where their parameter is; got one on {grad.device} and "
                f"{self.name()} on {device}; call zero_grad() after moving the model"
            )
        if grad.numel() != k:
            raise RuntimeError(
                f"gradients must have their parameter's shape {tuple(values.shape)}; got "
                f"{tuple(grad.shape)} for {self.name()}; call zero_grad() after replacing values"
            )
        for name, value in state.items():
            if name == "step":
                if not (
                    isinstance(value, Tensor) and value.dtype == torch.float32 and not value.dim()
                ):
                    self._refuse_step(value)
            elif not (
                isinstance(value, Tensor)
                and value.dtype == torch.float32
                and value.numel() == k
                and value.is_contiguous()
                and value.device == device
            ) and (name in state_names and value is not None):  # else a user's, or none yet
                self._refuse_state(name, value)

    def _refuse_step(self, value: Any) -> None:
        """Refuse a step count, unless it is a form that torch makes and a host's step can read."""
        count = isinstance(value, Tensor) and value.numel() == 1
        on_host = not self.group["capturable"]
        if not (count and value.dtype in (torch.float32, torch.float64)[: 1 + on_host]):
            raise RuntimeError(
                "state['step'] must be a float32 tensor of one element; got "
                f"{_form(value)} for parameter {self.name()}; load_state_dict() makes it one"
            )

    def _refuse_state(self, name: str, value: Any) -> None:
        """Refuse a tensor that a step would read past its end or as what it is not."""
        if isinstance(value, Tensor) and value.device != self.values.device:
            raise RuntimeError(
                f"state must be where its parameter is; got {name!r} on {value.device} and a "
                f"parameter on {self.values.device}; make the optimizer after model.to()"
            )
        raise RuntimeError(
            f"state must be contiguous float32 of its parameter's shape {tuple(self.values.shape)};"
            f" got {name!r} {_form(value)} for parameter {self.name()}; keep it as the optimizer "
            "made it"
        )

    def name(self) -> str:
        """Return how to call the parameter in an error: by its weight's name in the model."""
        if self.target is not None:
            return repr(self.target.name)
        position = next(i for i, p in enumerate(self.group["params"]) if p is self.values)
        names = self.group.get("param_names")
        return repr(names[position]) if names else f"number {position} of its param group"


def _refuse_other_form(values: CompactParameter) -> Tensor:
    """Refuse values that were replaced by others than k fp32 ones; return them as a tensor."""
    plain, shape = values.detach(), values.target.indices.shape
    if plain.dtype != torch.float32 or plain.shape != shape:
        raise RuntimeError(
            f"compact parameters must stay float32 of shape {tuple(shape)}; got "
            f"{_form(plain)} for {values.target.name!r}; write into them, or convert the model"
        )
    return plain


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} of shape {tuple(value.shape)} and strides {value.stride()}"


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


def count_versions(updates: list[Update]) -> None:
    """Tell autograd that values and weights changed, which raw pointers do not, and agree."""
    written = []
    for update in updates:
        written.append(update.plain)
        if isinstance(update.values, CompactParameter) and update.weight is not None:
            # Said first: another thread that reads the weight just now has nothing to write.
            update.values.agreed = update.plain._version + 1
            written.append(update.weight)
    torch.autograd.graph.increment_version(written)
    for update in updates:
        if update.target is not None and update.weight is not None:
            update.target.mark_written(update.weight)
