"""Tiny random models of the usual transformers families, each with batches of its own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from .case import Case, only


@functools.cache
def _transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.logging.set_verbosity_error()
    return transformers


_SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
_TEXT = {**_SMALL, "vocab_size": 50, "max_position_embeddings": 16}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_TEXT, **_IDS, "num_key_value_heads": 1}
_EXPERTS = {**_DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}
_IMAGE = {"image_size": 16, "num_labels": 3}
_SEQ2SEQ = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, **_IDS, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip


def text(labels: int | None = 3) -> list[dict[str, torch.Tensor]]:
    """Samples of different lengths, padded on the right; a label each, or the tokens' own."""
    batches = []
    for b, length in ((4, 6), (3, 5)):
        ids = torch.randint(3, 50, (b, length))
        used = torch.arange(length) < length - torch.arange(b).unsqueeze(1) % 3
        batch = {"input_ids": ids.masked_fill(~used, 0), "attention_mask": used.long()}
        batch["labels"] = ids.masked_fill(~used, -100)
        if labels is not None:
            batch["labels"] = torch.randint(0, labels, (b,))
        batches.append(batch)
    return batches


def language() -> list[dict[str, torch.Tensor]]:
    return text(None)


def tagged() -> list[dict[str, torch.Tensor]]:
    batches = language()
    for batch in batches:
        batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 5)
    return batches


def image() -> list[dict[str, torch.Tensor]]:
    return [
        {"pixel_values": torch.randn(b, 3, 16, 16), "labels": torch.randint(0, 3, (b,))}
        for b in (4, 3)
    ]


def sound() -> list[dict[str, torch.Tensor]]:
    return [
        {"input_values": torch.randn(b, 200), "labels": torch.randint(0, 3, (b,))} for b in (4, 3)
    ]


def speech() -> list[dict[str, torch.Tensor]]:
    return [
        {"input_features": torch.randn(b, 8, 20), "labels": torch.randint(3, 50, (b, 6))}
        for b in (4, 3)
    ]


@dataclasses.dataclass
class Family:
    """How to build a family's model.

    Attributes:
        model: the class's name.
        config: its configuration's name, and arguments.
        batches: makes them.
        fallback: names of what is known to be scored one sample at a time.
    """

    model: str
    config: tuple[str, dict[str, Any]]
    batches: Callable[[], list[dict[str, torch.Tensor]]]
    fallback: set[str] = dataclasses.field(default_factory=set)

    def make(self) -> Case:
        transformers = _transformers()
        name, arguments = self.config
        model = getattr(transformers, self.model)(getattr(transformers, name)(**arguments))
        plain = experts_one_by_one if "experts" in str(self.config) else None
        return Case(model, self.batches(), own_loss, self.fallback, plain=plain)


def experts_one_by_one(model: nn.Module) -> nn.Module:
    """Return a copy that runs its experts in a loop: grouped_mm has no float64 on a CPU."""
    model = copy.deepcopy(model)
    model.config._experts_implementation = "eager"
    return model


def own_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One loss per sample: the model's own, called on every sample alone."""
    return torch.stack(
        [model(**only(batch, b)).loss for b in range(len(batch["labels"]))]
    )  # fmt: skip


# Transformers and convolutional networks without experts or a scan: nothing may need the fallback.
DENSE = {
    "bert": Family(
        "BertForSequenceClassification", ("BertConfig", {**_TEXT, "num_labels": 3}), text
    ),
    "bert_mlm": Family("BertForMaskedLM", ("BertConfig", _TEXT), language),
    "bert_tokens": Family(
        "BertForTokenClassification", ("BertConfig", {**_TEXT, "num_labels": 5}), tagged
    ),
    "roberta": Family(
        "RobertaForSequenceClassification",
        ("RobertaConfig", {**_TEXT, "num_labels": 3, "pad_token_id": 0}), text,
    ),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        ("DistilBertConfig", {
            "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 50,
            "max_position_embeddings": 16, "num_labels": 3,
        }), text,
    ),
    "albert": Family(
        "AlbertForSequenceClassification",
        ("AlbertConfig", {**_TEXT, "embedding_size": 8, "num_labels": 3}), text,
    ),
    "electra": Family(
        "ElectraForSequenceClassification",
        ("ElectraConfig", {**_TEXT, "embedding_size": 8, "num_labels": 3}), text,
    ),
    "deberta_v2": Family(
        "DebertaV2ForSequenceClassification",
        ("DebertaV2Config", {
            **_TEXT, "num_labels": 3, "relative_attention": True, "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
        }), text,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        ("GPT2Config", {
            "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16,
            "bos_token_id": 1, "eos_token_id": 2,
        }), language,
    ),
    "opt": Family(
        "OPTForCausalLM",
        ("OPTConfig", {**_TEXT, **_IDS, "ffn_dim": 24, "word_embed_proj_dim": 8}), language,
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", ("GPTNeoXConfig", {**_TEXT, **_IDS}), language),
    "bloom": Family(
        "BloomForCausalLM",
        ("BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, **_IDS}),
        language,
    ),
    "llama": Family("LlamaForCausalLM", ("LlamaConfig", _DECODER), language),
    "mistral": Family(
        "MistralForCausalLM", ("MistralConfig", {**_DECODER, "sliding_window": 3}), language
    ),
    "qwen3_tied": Family(
        "Qwen3ForCausalLM",
        ("Qwen3Config", {**_DECODER, "head_dim": 8, "tie_word_embeddings": True}), language,
    ),
    "gemma2": Family("Gemma2ForCausalLM", ("Gemma2Config", {**_DECODER, "head_dim": 8}), language),
    "gemma3": Family(
        "Gemma3ForCausalLM", ("Gemma3TextConfig", {**_DECODER, "head_dim": 8}), language
    ),
    "phi": Family("PhiForCausalLM", ("PhiConfig", _DECODER), language),
    "t5": Family(
        "T5ForConditionalGeneration",
        ("T5Config", {
            "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
            "vocab_size": 50, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
        }), language,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        ("BartConfig", {**_SEQ2SEQ, "max_position_embeddings": 16}), language,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        ("WhisperConfig", {
            **_SEQ2SEQ, "max_source_positions": 10, "max_target_positions": 16, "num_mel_bins": 8,
        }), speech,
    ),
    "wav2vec2": Family(
        "Wav2Vec2ForSequenceClassification",
        ("Wav2Vec2Config", {
            **_SMALL, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_labels": 3,
        }), sound,
    ),
    "vit": Family(
        "ViTForImageClassification", ("ViTConfig", {**_SMALL, **_IMAGE, "patch_size": 8}), image
    ),
    "dinov2": Family(
        "Dinov2ForImageClassification",
        ("Dinov2Config", {**_SMALL, **_IMAGE, "patch_size": 8, "mlp_ratio": 2}), image,
    ),
    "swin": Family(
        "SwinForImageClassification",
        ("SwinConfig", {
            **_IMAGE, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2],
            "window_size": 4,
        }), image,
    ),
    "clip_vision": Family(
        "CLIPForImageClassification",
        ("CLIPConfig", {
            "vision_config": {**_SMALL, "image_size": 16, "patch_size": 8},
            "text_config": {**_SMALL, "num_hidden_layers": 1}, "num_labels": 3,
        }), image,
    ),
    "resnet": Family(
        "ResNetForImageClassification",
        ("ResNetConfig", {
            "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3,
            "layer_type": "bottleneck",
        }), image,
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        ("ConvNextConfig", {
            "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "patch_size": 4, **_IMAGE,
        }), image,
    ),
    "mobilenet_v2": Family(
        "MobileNetV2ForImageClassification",
        ("MobileNetV2Config", {**_IMAGE, "depth_multiplier": 0.25}), image,
    ),
}  # fmt: skip

# Mixtures of experts in each way that transformers runs them, and state spaces.
OTHERS = {
    f"mixtral_{way}": Family(
        "MixtralForCausalLM",
        ("MixtralConfig", {**_EXPERTS, "experts_implementation": way}), language,
    )
    for way in ("eager", "grouped_mm", "batched_mm")
}  # fmt: skip
OTHERS |= {
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        ("Qwen3MoeConfig", {
            **_DECODER, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
        }), language,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM", ("GptOssConfig", {**_EXPERTS, "head_dim": 8}), language
    ),
    "mamba": Family(
        "MambaForCausalLM",
        ("MambaConfig", {
            "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4, **_IDS,
        }), language,
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        ("Mamba2Config", {
            "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 50, "state_size": 4,
            "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4, **_IDS,
        }), language,
    ),
}  # fmt: skip

FAMILIES = DENSE | OTHERS


def huggingface(kind: str) -> Case:
    return FAMILIES[kind].make()
