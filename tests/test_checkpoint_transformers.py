"""Deltas on folders that transformers wrote and reads: tied weights, shards, and a new head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import assert_state, state_of

import fishfast as ff

transformers = pytest.importorskip("transformers", minversion="5")

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 12,
}  # fmt: skip


def gpt2() -> Any:
    """Tied: lm_head.weight is transformer.wte.weight, and is not saved."""
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def tune(model: Any, keep: list[str]) -> ff.SparseTuning:
    """Train a few steps; AdamW moves every weight of the mask."""
    tuned = ff.train_only(model, ff.random_mask(model, density=0.2, seed=0, keep=keep))
    optimizer = ff.AdamW(tuned.parameters(), lr=1e-2)
    tokens = torch.arange(10).view(2, 5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens).logits.square().sum().backward()
        optimizer.step()
    return tuned


@pytest.mark.parametrize("shard_size", ["1GB", "9KB"], ids=["one file", "shards"])
def test_a_tied_model_comes_back_tied(shard_size: str, tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    assert (len(list((tmp_path / "base").glob("*.safetensors"))) > 1) == (shard_size == "9KB")
    tuned = tune(model, [])
    ff.save_delta(tuned, tmp_path / "delta")
    tuned.release()
    done = ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_state(found, state_of(model))
    assert found.lm_head.weight is found.transformer.wte.weight
    assert not done.unknown
    assert not done.created
    # And from the two folders to a delta for the model.
    ff.diff_checkpoints(tmp_path / "base", tmp_path / "out", allow_large=True).save(tmp_path / "d")
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    ff.load_delta(tmp_path / "d").apply_(base)
    assert_state(base, state_of(model))


def test_a_pre_trained_model_gets_its_new_head(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    kind = transformers.BertForSequenceClassification
    model = kind.from_pretrained(tmp_path / "base")
    tuned = tune(model, ["classifier", "bert.pooler"])
    ff.save_delta(tuned, tmp_path / "delta")
    tuned.release()
    done = ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert {name.split(".")[-2] for name in done.created} == {"classifier", "dense"}
    assert all(name.startswith("cls.") for name in done.unknown)
    assert done.unknown
    found = kind.from_pretrained(tmp_path / "out")
    assert_state(found, state_of(model))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 16
    other = kind.from_pretrained(tmp_path / "base")
    tuned = tune(other, ["classifier"])
    ff.save_delta(tuned, tmp_path / "delta")
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.bias.* are not in .*keep="):
        ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "other")
