"""What options and parameters the optimizers take; all that is refused changes nothing."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishfast.training.gradient.tapped_module import CompactParameter

__all__ = [
    "UNSUPPORTED",
    "check_numbers",
    "number",
    "refuse_other_parameter",
    "refuse_unsupported",
    "require_not_negative",
]

# Options of torch's optimizers that change what a step is, and why there are none here.
UNSUPPORTED = {
    "differentiable": "weights are written in place, past autograd",
}


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Refuse options that these optimizers do not support.

    Args:
        options: of a param group.

    Raises:
        ValueError: one of `UNSUPPORTED` is set.
    """
    for name, reason in UNSUPPORTED.items():
        if options.get(name):
            raise ValueError(f"{name} must be False; got {options[name]}: {reason}")


def number(name: str, value: Any, where: str = "") -> Any:
    """Return an option as a number: what numpy made becomes a float, a tensor stays one.

    Args:
        name: of the option.
        value: as it was given.
        where: it was given, for the error.

    Raises:
        ValueError: neither a number nor a tensor or array with one element.
    """
    if type(value) is float:  # nearly always, and to ask for Real takes a microsecond
        return value
    if isinstance(value, (np.generic, np.ndarray)) and value.size == 1:
        value = value.item()
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return value
    got = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else f"{value!r}"
    raise ValueError(
        f"{name} must be a number or a tensor with one element; got {got}{where}"
        f"{_what_to_do(value)}"
    )


def _what_to_do(value: Any) -> str:
    if value is None:
        return "; leave it out for the default"
    if not isinstance(value, str):
        return ""
    # YAML 1.1 wants a dot in a number, so 1e-3 arrives as text.
    return ", which is text; pass float(...) of it, or write a dot in YAML, as in 1.0e-3"


def require_not_negative(**options: Any) -> dict[str, Any]:
    """Check numbers, or tensors with one element.

    Args:
        **options: the value of each option.

    Returns:
        The same names with numbers.

    Raises:
        ValueError: no number, a negative one, or NaN.
    """
    numbers = {name: number(name, value) for name, value in options.items()}
    for name, value in numbers.items():
        if not float(value) >= 0:
            raise ValueError(f"{name} must be at least 0; got {value}")
    return numbers


def check_numbers(group: dict[str, Any], names: tuple[str, ...]) -> None:
    """Refuse what a param group was given that is no number; make floats of numpy's, in place.

    Args:
        group: a param group.
        names: of options that must be numbers.

    Raises:
        ValueError: one is neither a number nor a tensor with one element.
    """
    for name in names:
        if type(group[name]) is not float:
            group[name] = number(name, group[name], " in a param group")


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
