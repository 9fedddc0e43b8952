"""A transformers-style model's outputs for a batch, for when no ``outputs_fn`` is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishfast.fisher.heads import HEADS
from fishfast.fisher.losses import IGNORED, Answer, ask_model, describe
from fishfast.fisher.virtual_tokens import num_virtual_tokens

__all__ = ["default_outputs"]

_ASK = f"pass outputs_fn(model, batch) returning the outputs, and head= one of {', '.join(HEADS)}"


def default_outputs(model: nn.Module, batch: Any) -> tuple[Tensor, str, Tensor | None]:
    """Return a transformers-style model's outputs for a batch, and what they are.

    By the same rules as `labelled_batch_losses`, whose labels are not needed here: logits
    ``[B, C]`` are softmax, or sigmoid for multi-label heads, or gaussian for regression (one
    output, or the config says so). The tokens of a language model count where labels are not -100;
    without labels, where the attention mask is not 0; without a mask, all.

    Args:
        model: called with the batch's entries as keyword arguments.
        batch: a mapping; its tensors are moved to the model's device.

    Returns:
        Outputs, head and counted positions (None but for "tokens"), as `output_rows` takes them.

    Raises:
        TypeError: the batch is not a mapping, or the output has no logits.
        ValueError: a task that needs an ``outputs_fn``.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches without an outputs_fn must be mappings; got {describe(batch)}; {_ASK}"
        )
    answer = ask_model(model, batch, _ASK)
    if answer.task is None:
        raise ValueError(
            f"outputs_fn is needed for logits of shape {tuple(answer.logits.shape)} with loss_type "
            f"{answer.loss_type!r}: what they are probabilities of is not known; {_ASK}"
        )
    if answer.task == "regression":
        return answer.logits, "gaussian", None
    if answer.task == "multi_label_classification":
        return answer.logits, "sigmoid", None
    if not answer.task.endswith("tokens"):
        return answer.logits, "softmax", None
    shifted = answer.task == "next tokens"
    mask = answer.inputs.get("decoder_attention_mask" if answer.decodes else "attention_mask")
    own = answer.inputs.get("labels", mask)
    if own is None:
        own = answer.inputs.get("input_ids", answer.logits[..., 0])
    virtual = num_virtual_tokens(model, answer.logits, own, _ASK)
    return answer.logits, "tokens", _counted_positions(answer, shifted, mask, virtual)


def _counted_positions(answer: Answer, shifted: bool, mask: Tensor | None, virtual: int) -> Tensor:
    """Return bool [B, T]: positions whose distribution is for a token that counts."""
    if "labels" in answer.inputs:
        counted = answer.inputs["labels"] != IGNORED
    elif mask is not None:
        counted = mask != 0
    else:
        counted = torch.ones_like(answer.logits[:, virtual:, 0], dtype=torch.bool)
    of_token = F.pad(counted, (virtual, 0))  # virtual tokens are none of the batch
    if not shifted:
        return of_token
    following = F.pad(of_token[:, 1:], (0, 1))  # the last position is for no token of the batch
    # Padding on the left does not predict the first token; virtual tokens do.
    present = F.pad(counted, (virtual, 0), value=True)
    return following if "labels" in answer.inputs else following & present
