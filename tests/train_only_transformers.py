"""Tiny transformers with a loss."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def tiny_transformer(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    import transformers as tf

    torch.manual_seed(0)
    tokens = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    if name == "bert":
        model = tf.BertForSequenceClassification(tf.BertConfig(**TINY))
        labels = torch.tensor([0, 1, 0])
    elif name == "gpt2":
        config = tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, **ENDS)
        model, labels = tf.GPT2LMHeadModel(config), tokens
        assert model.lm_head.weight is model.transformer.wte.weight
    else:
        experts = {"num_key_value_heads": 1, "num_local_experts": 3, "pad_token_id": 0}
        model = tf.MixtralForCausalLM(
            tf.MixtralConfig(**TINY, **ENDS, **experts, max_position_embeddings=32)
        )
        labels = tokens
    return model.eval(), lambda m: m(input_ids=tokens, labels=labels).loss
