"""A tiny Llama learns through its mask, with the compiled steps as with plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepping import TORCH_HAS_FMA, CorrectSqrt, assert_state, state_of
from torch import nn
from train_only_transformers import ENDS, TINY

import fishfast as ff

STEPS = 32


def tiny_llama() -> nn.Module:
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, **ENDS, **sizes))


def train(backend: str, make: Any, options: dict[str, Any]) -> tuple[nn.Module, list[float]]:
    """Train a tenth of the weights on one batch; returns model and losses."""
    model = tiny_llama()
    tokens = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    per_sample = [{"input_ids": row[None], "labels": row[None]} for row in tokens]
    mask = ff.top_k_mask(ff.estimate_fisher(model, per_sample), density=0.1)
    tuned = ff.train_only(model, mask)
    optimizer = make(tuned.parameters(), backend=backend, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize(
    ("make", "options", "falls_to"),
    [
        (ff.AdamW, {"lr": 0.03, "weight_decay": 0.01}, 0.25),
        (ff.SGD, {"lr": 0.5, "momentum": 0.9, "nesterov": True}, 0.5),
    ],
    ids=["AdamW", "SGD"],
)
def test_loss_falls_alike_with_and_without_the_kernels(
    make: Any, options: dict[str, Any], falls_to: float
) -> None:
    with CorrectSqrt():
        compiled, losses = train("cpu", make, options)
        plain, expected = train("torch", make, options)
    assert losses[-1] < falls_to * losses[0]
    assert expected[-1] < falls_to * expected[0]
    if TORCH_HAS_FMA:  # elsewhere the roundings differ, and 32 steps carry that on
        assert losses == expected
        assert_state(compiled, state_of(plain))
