"""Transformers of the usual kinds, tiny, with their own losses."""

from __future__ import annotations

import functools
import os

import torch

from .case import Case, only


@functools.cache
def _transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


_TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 50, "max_position_embeddings": 16,
}  # fmt: skip
_LLAMA = {
    **_TINY,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _language_batches(*sizes, length=6, with_mask=True):
    batches = []
    for b in sizes:
        ids = torch.randint(3, 50, (b, length))
        labels = ids.clone()
        mask = torch.ones_like(ids)
        for i in range(b):  # samples of different lengths, padded on the right
            used = length - i % 3
            labels[i, used:] = -100
            mask[i, used:] = 0
        batch = {"input_ids": ids, "labels": labels}
        batches.append({**batch, "attention_mask": mask} if with_mask else batch)
    return batches


def _own_loss(model, batch):
    """One loss per sample: the model's own, called on every sample alone."""
    return torch.stack(
        [model(**only(batch, b)).loss for b in range(len(batch["labels"]))]
    )  # fmt: skip


def huggingface(kind):
    tf = _transformers()
    classes = {
        "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_TINY, num_labels=3)),
        "bert_mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**_TINY)),
        "bert_tokens": lambda: tf.BertForTokenClassification(tf.BertConfig(**_TINY, num_labels=5)),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16,
                          bos_token_id=1, eos_token_id=2)
        ),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)),
        "qwen3_tied": lambda: tf.Qwen3ForCausalLM(
            tf.Qwen3Config(**_LLAMA, head_dim=8, tie_word_embeddings=True)
        ),
        "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_LLAMA, head_dim=8)),
        "mixtral": lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**_LLAMA, num_local_experts=3, num_experts_per_tok=2,
                             experts_implementation="eager")  # the other has no float64
        ),
        "t5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=50,
                        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
        ),
        "bart": lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                          vocab_size=50, max_position_embeddings=16, decoder_start_token_id=2,
                          pad_token_id=1, bos_token_id=0, eos_token_id=2, forced_eos_token_id=2)
        ),
    }  # fmt: skip
    model = classes[kind]()
    if kind == "bert":
        batches = [
            {**b, "labels": torch.randint(0, 3, (len(b["labels"]),))}
            for b in _language_batches(4, 3)
        ]
    elif kind == "bert_tokens":
        batches = _language_batches(4, 3)
        for batch in batches:
            batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 5)
    else:
        batches = _language_batches(4, 3)
    return Case(model, batches, _own_loss, set())


HUGGINGFACE = [
    "bert", "bert_mlm", "bert_tokens", "gpt2", "llama", "qwen3_tied", "gemma2", "mixtral", "t5",
    "bart",
]  # fmt: skip
