"""Labels of models that put virtual tokens before a batch's own: PEFT's prompt learning methods.

Prompt tuning, p-tuning and CPT give logits for the virtual tokens, too, in front of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["num_virtual_tokens", "with_virtual_tokens"]


def num_virtual_tokens(model: nn.Module, logits: Tensor, own: Tensor, remedy: str) -> int:
    """Return how many positions of the logits come before those of the batch.

    Args:
        model: what gave the logits.
        logits: ``[B, T, V]``.
        own: of the batch's positions, ``[B, T']``.
        remedy: what to pass instead, for the message.

    Returns:
        T - T', 0 for most models.

    Raises:
        ValueError: the positions do not fit, and the model says of no virtual tokens.
    """
    extra = logits.shape[1] - own.shape[1]
    if extra and extra != getattr(_prompt_config(model), "num_virtual_tokens", 0):
        raise ValueError(
            f"logits and labels must be of the same positions; got logits for {logits.shape[1]} "
            f"and labels for {own.shape[1]} tokens: how they align is not known; {remedy}"
        )
    return extra


def with_virtual_tokens(
    model: nn.Module, inputs: Mapping[str, Any], logits: Tensor, ignored: int, remedy: str
) -> tuple[Tensor, Tensor | None]:
    """Return the labels of all positions of the logits, as PEFT's own loss has them.

    Args:
        model: what gave the logits.
        inputs: the batch, with ``labels`` ``[B, T']``.
        logits: ``[B, T, V]``.
        ignored: the label of a position that does not count.
        remedy: what to pass instead, for messages.

    Returns:
        Labels ``[B, T]``, and the weights of their losses or None: CPT can weight them.
    """
    labels = inputs["labels"]
    extra = num_virtual_tokens(model, logits, labels, remedy)
    config: Any = _prompt_config(model)
    if extra and getattr(config, "cpt_token_ids", None) is not None:
        return _of_cpt(config, inputs, labels, ignored)
    return F.pad(labels, (extra, 0), value=ignored) if extra else labels, None


def _prompt_config(model: nn.Module) -> object:
    found = (getattr(module, "active_peft_config", None) for module in model.modules())
    return next((config for config in found if config is not None), None)


def _of_cpt(
    config: Any, inputs: Mapping[str, Any], labels: Tensor, ignored: int
) -> tuple[Tensor, Tensor | None]:
    """Return labels and weights of context-aware prompt tuning.

    The context's own labels count, too. A position's type says what it is: a multiple of 4 is a
    label, that of a later example has a larger one.
    """
    context = torch.tensor(
        [config.cpt_token_ids, config.cpt_tokens_type_mask], device=labels.device
    )
    tokens, types = (row.expand(len(labels), -1) for row in context)
    own = inputs.get("input_type_mask", torch.full_like(labels, 4)).to(types.dtype)
    types = torch.cat([types, torch.where(own > 0, own + types.max(), own)], 1)
    is_label = (types > 0) & (types % 4 == 0)
    labels = torch.where(is_label, torch.cat([tokens, labels], 1), ignored)
    if config.opt_weighted_loss_type != "decay":
        return labels, None
    weights = torch.ones(types.shape, device=labels.device)
    for weight, kinds, label in zip(weights, types, is_label, strict=True):
        later_first = kinds[1:][label[1:]].unique().flip(0)  # the first position is for no loss
        for power, kind in enumerate(later_first.tolist()):
            weight[kinds == kind] = config.opt_loss_decay_factor**power
    return labels, weights
