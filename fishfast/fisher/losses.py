"""Per-sample losses of a transformers-style model and batch, for when no ``loss_fn`` is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishfast.fisher.virtual_tokens import with_virtual_tokens

__all__ = ["IGNORED", "Answer", "ask_model", "describe", "labelled_batch_losses"]

IGNORED = -100  # the label of a position that does not count
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


# Decoders whose own loss does not shift the labels, though transformers calls them causal.
_NOT_SHIFTED = (
    "Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "CpmAnt", "MBart", "Marian", "Mvp",
    "PLBart", "Pegasus", "TrOCR", "Whisper",
)  # fmt: skip

# Models with several losses, or one for each token, or of several tokens ahead.
_OTHER_LOSSES = ("ForPreTraining", "ProphetNetForCausalLM")


def labelled_batch_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return one loss per sample for a batch with ``labels``.

    Classification: cross entropy, or binary cross entropy averaged over the labels of a
    multi-label head. Regression: squared error averaged over the outputs. Language modelling:
    cross entropy averaged over the sample's own labels that are not -100, shifted by one for a
    causal model only. Virtual tokens that PEFT puts before them have no labels, except in CPT.
    The task is the model's own ``loss_type`` (transformers) or, for a module
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
            f"{describe(batch)}; {_ASK}"
        )
    answer = ask_model(model, batch, _ASK)
    logits, labels = answer.logits.float(), answer.inputs["labels"]
    if answer.task in ("next tokens", "same tokens"):
        labels, weights = with_virtual_tokens(model, answer.inputs, logits, IGNORED, _ASK)
        if answer.task == "next tokens":
            logits, labels = logits[:, :-1], labels[:, 1:]
            weights = None if weights is None else weights[:, 1:]
        return _token_losses(logits, labels, weights)
    if answer.task is None:
        raise ValueError(
            f"loss_fn is needed for logits of shape {tuple(logits.shape)} with loss_type "
            f"{answer.loss_type!r}: how labels align with them is not known; {_ASK}"
        )
    return _head_losses(logits, labels, answer.task)


class Answer(NamedTuple):
    """A model's logits for a batch, and what they are for.

    Attributes:
        logits: as the model gives them.
        inputs: the batch's entries on the model's device, labels too.
        task: "next tokens" or "same tokens" (which label a position is for), transformers' name of
            a head's problem_type, or None where it is not known.
        loss_type: transformers' name of the task.
        decodes: whether the logits are for a decoder's tokens, not for those that were given.
    """

    logits: Tensor
    inputs: dict[str, Any]
    task: str | None
    loss_type: str | None
    decodes: bool


def ask_model(model: nn.Module, batch: Mapping[str, Any], remedy: str) -> Answer:
    """Run a transformers-style model on a batch, whose ``labels`` need not be there.

    Args:
        model: called with the batch's entries as keyword arguments.
        batch: its tensors are moved to the model's device.
        remedy: what to pass instead, for messages.

    Returns:
        The logits and the task.

    Raises:
        TypeError: the output has no logits.
    """
    device = next(model.parameters()).device
    inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    config = getattr(model, "config", None)
    encoder_decoder = any(
        getattr(part, "is_encoder_decoder", False)
        for part in (config, getattr(config, "text_config", None))
    )
    # The model's own loss is a mean over the batch: not needed, and for a language model big. An
    # encoder-decoder makes its decoder's inputs of the labels.
    given = {name: v for name, v in inputs.items() if name != "labels" or encoder_decoder}
    output = model(**given)
    if isinstance(output, Mapping):
        logits = output.get("logits")
    else:
        logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model's output has no 'logits'; got {describe(output)}; {remedy}")

    loss_type = kind = getattr(model, "loss_type", None)
    if type(model).__name__ in _CAUSAL_MODELS:
        kind = _TOKENS_NEXT[0]
    elif type(model).__name__.removesuffix("ForCausalLM") in _NOT_SHIFTED:
        kind = _TOKENS_SAME[0]
    elif type(model).__name__.endswith(_OTHER_LOSSES):
        kind = "another loss"
    elif kind == _GENERATION:
        kind = _TOKENS_SAME[0] if encoder_decoder else _TOKENS_NEXT[0]
    task = None
    if kind in _TOKENS_NEXT and logits.dim() == 3:
        task = "next tokens"
    elif kind in _TOKENS_SAME and logits.dim() == 3:
        task = "same tokens"
    elif kind in _CLASSIFICATION or (kind is None and logits.dim() == 2):
        task = getattr(config, "problem_type", None) or _problem_type(logits, inputs.get("labels"))
    return Answer(logits, inputs, task, loss_type, encoder_decoder)


def _problem_type(logits: Tensor, labels: Any) -> str:
    """Return the problem that transformers' own loss takes these labels for: by their dtype.

    Integers of the logits' shape, which transformers cannot use, are yes or no for each label.
    """
    if logits.shape[1] == 1:
        return "regression"
    if labels is None or (_is_integer(labels) and labels.numel() == len(logits)):
        return "single_label_classification"
    return "multi_label_classification"


def _is_integer(labels: Tensor) -> bool:
    return labels.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _token_losses(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    losses = losses if weights is None else losses * weights
    counted = (labels != IGNORED).sum(1)
    return losses.sum(1) / counted.clamp(min=1)


def _head_losses(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    if problem_type == "regression":
        return (logits - labels.reshape(logits.shape)).square().mean(1)
    if problem_type == "multi_label_classification":
        if labels.shape != logits.shape:
            raise ValueError(
                "labels must be integers, one for each sample, or have the logits' shape; got "
                f"{labels.dtype} of shape {tuple(labels.shape)} for logits of shape "
                f"{tuple(logits.shape)}; {_ASK}"
            )
        targets = labels.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    labels = labels.reshape(-1).long()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


def describe(value: Any) -> str:
    """Name a value's type and, for a mapping, its entries."""
    if isinstance(value, Mapping):
        return f"a mapping with {sorted(map(str, value))}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
