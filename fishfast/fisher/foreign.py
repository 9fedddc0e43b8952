"""Parameters and models of other libraries: what can be scored of them, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishfast.fisher.engine.operands import is_opaque

__all__ = ["as_sharded", "local", "refuse_sample_hooks", "zeros_of_part"]


def zeros_of_part(parameter: nn.Parameter) -> Tensor:
    """Return fp32 zeros for a parameter's scores, of this process's part of a DTensor.

    They have the parameter's strides, so that a view of a parameter is a view of its scores.
    """
    part = local(parameter.detach())
    if is_opaque(part):  # quantized: the scores are not
        return torch.zeros(part.shape, dtype=torch.float32, device=part.device)
    return torch.zeros_like(part, dtype=torch.float32)


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return this process's part of a DTensor, sharded as ``like`` is; others as they are."""
    sharded: Any = tensor
    if not hasattr(sharded, "placements"):
        return tensor
    if like is not None:  # a gradient may be a sum that is still to be taken
        sharded = sharded.redistribute(placements=getattr(like, "placements", None))
    return sharded.to_local()


def as_sharded(
    scores: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return scores as what their parameters are: those of a DTensor's parts as a DTensor."""
    return {name: _sharded(score, parameters[name]) for name, score in scores.items()}


def _sharded(score: Tensor, parameter: Any) -> Tensor:
    if not hasattr(parameter, "placements"):
        return score
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  # seconds, where there is none

    return DTensor.from_local(
        score, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def refuse_sample_hooks(model: nn.Module) -> None:
    """Refuse a model whose layers take per-sample gradients themselves, in hooks of Opacus.

    Args:
        model: any module.

    Raises:
        ValueError: a GradSampleModule, or the model in one, with its hooks enabled.
    """
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._backward_hooks.values()):
            function = hook.func if isinstance(hook, functools.partial) else hook
            owner = getattr(function, "__self__", None)
            if type(owner).__module__.partition(".")[0] == "opacus" and getattr(
                owner, "hooks_enabled", True
            ):
                raise ValueError(
                    "model must not take per-sample gradients of its own; got the hooks of Opacus' "
                    f"{type(owner).__name__}, which keep an input for each backward and run out of "
                    "them; call its disable_hooks() before scoring and enable_hooks() after, or "
                    "pass what its to_standard_module() returns"
                )
