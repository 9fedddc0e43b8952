"""Per-sample losses of a transformers-style model and batch, for when no ``loss_fn`` is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["labelled_batch_losses"]

_IGNORED = -100
_ASK = "pass loss_fn(model, batch) returning a vector of per-sample losses"
# transformers' names for the tasks (model.loss_type).
_CLASSIFICATION = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)
_TOKENS_NEXT = ("ForCausalLM",)
_TOKENS_SAME = ("ForMaskedLM", "ForTokenClassification")
# Next tokens where the model only decodes (images and text in one sequence), else the same.
_GENERATION = "ForConditionalGeneration"
# Models without a loss_type whose own loss is that of a causal model.
_CAUSAL_MODELS = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "CTRLLMHeadModel", "BertLMHeadModel")


def labelled_batch_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return one loss per sample for a batch with ``labels``.

    Classification: cross entropy, or binary cross entropy averaged over the labels of a
    multi-label head. Regression: squared error averaged over the outputs. Language modelling:
    cross entropy averaged over the sample's own labels that are not -100, shifted by one for a
    causal model only. The task is the model's own ``loss_type`` (transformers) or, for a module
    without one, follows from the shapes of logits ``[B, C]`` and labels. Auxiliary losses that a
    model adds to its own, such as a router's load balancing, are not included.

    Args:
        model: called with the batch's entries as keyword arguments.
        batch: a mapping with ``labels``; its tensors are moved to the model's device.

    Returns:
        The losses, shape ``[B]``, fp32.

    Raises:
        TypeError: the batch is not a mapping with ``labels``, or the output has no logits.
        ValueError: a task that needs a ``loss_fn``.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise TypeError(
            "batches without a loss_fn must be mappings with 'labels'; got "
            f"{_describe(batch)}; {_ASK}"
        )
    device = next(model.parameters()).device
    inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    labels = inputs["labels"]
    config = getattr(model, "config", None)
    encoder_decoder = any(
        getattr(part, "is_encoder_decoder", False)
        for part in (config, getattr(config, "text_config", None))
    )
    if not encoder_decoder:
        # The model's own loss is a mean over the batch: not needed, and for a language model big.
        del inputs["labels"]
    output = model(**inputs)
    if isinstance(output, Mapping):
        logits = output.get("logits")
    else:
        logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model's output has no 'logits'; got {_describe(output)}; {_ASK}")

    logits, task = logits.float(), getattr(model, "loss_type", None)
    if type(model).__name__ in _CAUSAL_MODELS:
        task = _TOKENS_NEXT[0]
    elif task == _GENERATION:
        task = _TOKENS_SAME[0] if encoder_decoder else _TOKENS_NEXT[0]
    if task in _TOKENS_NEXT and logits.dim() == 3:
        return _token_losses(logits[:, :-1], labels[:, 1:])
    if task in _TOKENS_SAME and logits.dim() == 3:
        return _token_losses(logits, labels)
    if task in _CLASSIFICATION or (task is None and logits.dim() == 2):
        return _head_losses(logits, labels, getattr(config, "problem_type", None))
    raise ValueError(
        f"loss_fn is needed for logits of shape {tuple(logits.shape)} with loss_type {task!r}: how "
        f"labels align with them is not known; {_ASK}"
    )


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=_IGNORED
    )
    counted = (labels != _IGNORED).sum(1)
    return losses.sum(1) / counted.clamp(min=1)


def _head_losses(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    if problem_type is None:
        if logits.shape[1] == 1:
            problem_type = "regression"
        elif labels.dim() == 1 and not labels.is_floating_point():
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    if problem_type == "regression":
        return (logits - labels.view_as(logits)).square().mean(1)
    if problem_type == "multi_label_classification":
        targets = labels.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return F.cross_entropy(logits, labels.view(-1), reduction="none", ignore_index=_IGNORED)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with {sorted(map(str, value))}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
