"""How many weights train, in PEFT's format."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_only_modules import TiedNet, mask_over_all
from train_only_net import tuned_net

import fishfast as ff


def test_counts_masked_entries_and_each_base_weight_once() -> None:
    tuned = tuned_net()
    # conv 4x3x3x3 + 4, norm 4 + 4, first 6x4 + 6 (its weight is again's), again 6, free 2x6 + 2
    assert tuned.get_nb_trainable_parameters() == (tuned.num_selected, 112 + 8 + 30 + 6 + 14)


def test_counts_a_tied_weight_once() -> None:
    model = TiedNet()
    tuned = ff.train_only(model, mask_over_all(model))
    assert tuned.get_nb_trainable_parameters() == (19, 66)  # 0.3 of 11 x 6


def test_counts_what_else_the_user_trains() -> None:
    tuned = tuned_net()
    tuned.model.free.bias.requires_grad_(True)
    assert tuned.get_nb_trainable_parameters()[0] == tuned.num_selected + 2
    # requires_grad on a masked weight trains no more of it than its mask
    tuned.model.conv._parameters["weight"].requires_grad_(True)
    assert tuned.get_nb_trainable_parameters()[0] == tuned.num_selected + 2


def test_prints_what_peft_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT's own method on a model with as many trained weights of as many."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(300, 40, bias=False))
    ff.train_only(model, ff.random_mask(model, k=1234, seed=0)).print_trainable_parameters()
    ours = capsys.readouterr().out

    plain = nn.Module()
    plain.trained = nn.Parameter(torch.zeros(1234))
    plain.frozen = nn.Parameter(torch.zeros(300 * 40 - 1234), requires_grad=False)
    plain.get_nb_trainable_parameters = lambda: peft.PeftModel.get_nb_trainable_parameters(plain)
    peft.PeftModel.print_trainable_parameters(plain)
    assert ours == capsys.readouterr().out
    assert ours == "trainable params: 1,234 || all params: 12,000 || trainable%: 10.2833\n"
