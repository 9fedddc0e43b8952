"""What `--smoke` runs on instead of a download: a tiny BERT and a few sentences.

The BERT is random, not pre-trained: it shows that everything works, not how well. Fisher scores
say little about a random net, so the smoke runs train half of it; of a pre-trained one, 0.5 %.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def smoke_data(name: str) -> dict[str, Dataset]:
    """Return ``data/<name>.jsonl`` as `load_dataset` would: split -> rows."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    splits: dict[str, list[dict]] = {}
    for row in rows:
        splits.setdefault(row.pop("split"), []).append(row)
    return {split: Dataset.from_list(found) for split, found in splits.items()}


def save_tiny_bert(folder: Path) -> str:
    """Write a random BERT of 18 k weights, and a tokenizer made from the smoke data.

    Args:
        folder: where to; made if it is not there.

    Returns:
        The folder's name, for ``from_pretrained``.
    """
    texts = [
        text
        for file in sorted(DATA.glob("*.jsonl"))
        for row in map(json.loads, file.read_text().splitlines())
        for key, text in row.items()
        if key.startswith("sentence")
    ]
    tokenizer = _word_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return str(folder)


def _word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, which adds [CLS] and [SEP] as BERT's does."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = list(SPECIAL.values())
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **SPECIAL)
