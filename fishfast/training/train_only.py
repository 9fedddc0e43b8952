"""`train_only`: freeze a model but for the weights of a mask."""

from __future__ import annotations

import torch
from torch import nn

from fishfast._lazy import refuse_lazy
from fishfast.mask.sparse_mask import SparseMask
from fishfast.training.base_identity import BaseIdentity
from fishfast.training.gradient.tapped_module import compact_parameters, tap, untap
from fishfast.training.handle import SparseTuning
from fishfast.training.targets import find_targets
from fishfast.training.values.target import DENSE_GRADIENT_LIMIT

__all__ = ["train_only"]


def train_only(
    model: nn.Module, mask: SparseMask, *, dense_gradient_limit: int = DENSE_GRADIENT_LIMIT
) -> SparseTuning:
    """Freeze a model but for the weights of a mask, which become compact fp32 parameters.

    Every weight gets ``requires_grad=False``; next to each masked one its k values are registered
    as an fp32 parameter, ``<name>_values``. So ``model.parameters()`` has what is trained, and
    gradient clipping, loss scaling, schedulers, DistributedDataParallel and torch optimizers work
    as they are. ``model.state_dict()`` keeps the base model's keys; the values live in the weights,
    and as fp32 masters in the compact parameters and the optimizer's state. Weights outside the
    mask stay bit-identical.

    Args:
        model: changed in place; fp32, bf16 or fp16 weights.
        mask: which weights to train.
        dense_gradient_limit: bytes, default 64 MiB. In backward a linear or convolution layer may
            make the dense gradient of its weight, and pick the masked entries out of it, where that
            is fastest and the weight has at most so many bytes; one such gradient lives at a time.
            0: never. ``tuned.report()`` names the way of each weight.

    Returns:
        The handle: ``tuned.parameters()`` for the optimizer, ``attach``, ``release``.

    Raises:
        TypeError: ``mask`` is not a `SparseMask`, ``dense_gradient_limit`` no integer, or ``model``
            no module, or a scripted one.
        ValueError: a negative limit, a mask that selects nothing or does not fit the model, a
            weight whose dtype or memory cannot be trained so, or that is lazy. The model is left as
            it was.
        RuntimeError: the model has a mask already, or the call is in inference mode.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(8, 2)
        >>> tuned = ff.train_only(model, ff.random_mask(model, density=0.25, seed=0))
        >>> optimizer = ff.AdamW(tuned.parameters(), lr=1e-2)
        >>> model(torch.randn(3, 8)).square().sum().backward()
        >>> optimizer.step()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("model must not hold torch.jit modules; train before scripting it")
    if not isinstance(mask, SparseMask):
        raise TypeError(f"mask must be a SparseMask; got {type(mask).__name__}; see top_k_mask")
    _check_limit(dense_gradient_limit)
    if next(compact_parameters(model), None) is not None:
        raise RuntimeError("model has a mask already; call release() on its handle first")
    if mask.num_selected == 0:
        raise ValueError("mask must select at least one weight; got an empty mask")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("train_only must not be called in inference mode; its tensors would be")
    refuse_lazy(model)
    mask.check_fits(model)
    targets = find_targets(model, mask)
    for target in targets:
        target.dense_gradient_limit = dense_gradient_limit
    base = BaseIdentity.of(model, mask)

    trainable = {
        name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)
    }
    frozen = list(model.parameters())
    try:
        for target in targets:
            tap(target)
    except BaseException:  # such as from a class that cannot be derived from
        untap(model)
        raise
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None  # a frozen weight's gradient would only hold memory
    return SparseTuning(model, mask, base, trainable, dense_gradient_limit)


def _check_limit(limit: int) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(
            f"dense_gradient_limit must be an integer, in bytes; got {type(limit).__name__}"
        )
    if limit < 0:
        raise ValueError(
            f"dense_gradient_limit must be at least 0; got {limit}; with 0 linear and convolution "
            "layers make no dense gradient"
        )
