"""The gradient tap inside transformers: tied heads, experts, checkpoints of their own kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stepping import assert_state, same_bits
from torch import nn
from train_only_modules import assert_tap_is_exact, dense_gradients, mask_over_all
from train_only_transformers import tiny_transformer

import fishfast as ff


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral"])
def test_transformer(name: str) -> None:
    model, loss = tiny_transformer(name)
    keys = list(model.state_dict())
    expected = dense_gradients(copy.deepcopy(model), loss)
    tuned = ff.train_only(model, mask_over_all(model))
    assert list(model.state_dict()) == keys
    assert_tap_is_exact(tuned, expected, loss)
    before = loss(model).item()
    ff.SGD(tuned.parameters(), lr=0.01).step()
    assert loss(model).item() < before


def test_transformer_with_gradient_checkpointing() -> None:
    model, loss = tiny_transformer("bert")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = dense_gradients(copy.deepcopy(model), loss)
    tuned = ff.train_only(model, mask_over_all(model))
    assert_tap_is_exact(tuned, expected, loss)


def test_transformer_save_pretrained(tmp_path: Any) -> None:
    import transformers as tf

    model, loss = tiny_transformer("gpt2")
    tuned = ff.train_only(model, mask_over_all(model))
    loss(model).backward()
    ff.SGD(tuned.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert same_bits(tensor, model.state_dict()[name]), name


def test_transformer_tied_again_as_the_error_says() -> None:
    model, loss = tiny_transformer("gpt2")
    tuned = ff.train_only(model, mask_over_all(model))
    base = {name: tensor + 1.0 for name, tensor in model.state_dict().items()}
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    model.load_state_dict(copy.deepcopy(base), assign=True)
    loss(model).backward()
    with pytest.raises(RuntimeError, match=r"model\.tie_weights\(\) in no_grad mode"):
        optimizer.step()
    with torch.no_grad():
        model.tie_weights()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert_state(model, base)
