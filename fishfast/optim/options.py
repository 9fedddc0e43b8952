"""What options and parameters the optimizers take; all that is refused changes nothing."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fishfast.training.gradient.tapped_module import CompactParameter

__all__ = [
    "UNSUPPORTED",
    "refuse_not_numbers",
    "refuse_other_parameter",
    "refuse_unsupported",
    "require_not_negative",
]

# Options of torch's optimizers that change what a step is, and why there are none here.
UNSUPPORTED = {
    "differentiable": "weights are written in place, past autograd",
}


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Refuse options that there are none of.

    Args:
        options: of a param group.

    Raises:
        ValueError: one of `UNSUPPORTED` is set.
    """
    for name, reason in UNSUPPORTED.items():
        if options.get(name):
            raise ValueError(f"{name} must be False; got {options[name]}: {reason}")


def require_not_negative(**options: float | Tensor) -> None:
    """Check numbers, or tensors with one element.

    Args:
        **options: the value of each option.

    Raises:
        ValueError: a negative number, NaN, or a tensor with another number of elements.
    """
    for name, value in options.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor with one element; got shape "
                f"{tuple(value.shape)}"
            )
        if not float(value) >= 0:
            raise ValueError(f"{name} must be at least 0; got {value}")


def refuse_not_numbers(group: dict[str, Any], names: tuple[str, ...]) -> None:
    """Refuse what a param group was given since it was made.

    Args:
        group: a param group.
        names: of options that must be numbers.

    Raises:
        ValueError: one is neither a number nor a tensor with one element.
    """
    for name in names:
        value = group[name]
        # Nearly all are floats, and to ask for Real takes a microsecond.
        is_number = type(value) is float or isinstance(value, Real)
        if not (is_number or (isinstance(value, Tensor) and value.numel() == 1)):
            raise ValueError(
                f"{name} must be a number or a tensor with one element; got {value!r} in a "
                "param group"
            )


def refuse_other_parameter(parameter: Tensor) -> None:
    """Refuse a parameter that a step cannot train.

    Args:
        parameter: compact, or a plain one that is trained densely.

    Raises:
        ValueError: a plain one of another dtype than fp32, or not contiguous.
    """
    if isinstance(parameter, CompactParameter):
        return
    if parameter.dtype != torch.float32 or not parameter.is_contiguous():
        raise ValueError(
            "params must be compact parameters or contiguous float32 ones; got "
            f"{parameter.dtype} of shape {tuple(parameter.shape)}; pass tuned.parameters()"
        )
