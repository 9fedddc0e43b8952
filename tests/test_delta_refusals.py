"""Deltas are refused where they do not belong, and the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from delta_net import Net, mask_with_head, train
from stepping import assert_state, mask_of, some_indices, state_of
from torch import nn

import fishfast as ff


def _unmasked() -> int:
    masked = set(mask_with_head(Net())["conv.weight"].tolist())
    return next(index for index in range(Net().conv.weight.numel()) if index not in masked)


def other_content() -> nn.Module:
    model = Net()
    with torch.no_grad():
        model.conv.weight.view(-1)[_unmasked()] += 1e-7
    return model


def extra_layer() -> nn.Module:
    model = Net()
    model.extra = nn.Linear(1, 1)
    return model


def untied() -> nn.Module:
    model = Net()
    model.again.weight = nn.Parameter(model.first.weight.detach().clone())
    return model


def without_conv() -> nn.Module:
    model = Net()
    model.conv = nn.Identity()
    return model


def other_shape() -> nn.Module:
    model = Net()
    model.conv = nn.Conv2d(3, 5, 3)
    return model


def without_buffers() -> nn.Module:
    model = Net()
    model.norm = nn.BatchNorm2d(4, track_running_stats=False)
    return model


WRONG_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one weight differs": (other_content, "another base model: its weights or buffers differ"),
    "extra layer": (extra_layer, "another base model: its names, shapes, dtypes or ties differ"),
    "tied weight untied": (untied, "another base model: its names, shapes, dtypes or ties differ"),
    "layer missing": (without_conv, r"must fit the model; it names 'conv\.weight'"),
    "another shape": (other_shape, r"must fit the model; 'conv\.weight' has shape \(4, 3, 3, 3\)"),
    "another dtype": (lambda: Net().bfloat16(), "must fit the model; .* is torch.float32 in the"),
    "buffers missing": (without_buffers, "must fit the model; it sets the buffer 'norm\\."),
}


@pytest.mark.parametrize("name", WRONG_BASES)
def test_another_base_is_refused(name: str, path: Path) -> None:
    make, message = WRONG_BASES[name]
    model = make()
    before = state_of(model)
    delta = ff.load_delta(path)
    with pytest.raises(ValueError, match=message):
        delta.apply_(model)
    assert_state(model, before)
    with pytest.raises(RuntimeError, match="this delta is not on the model"):
        delta.revert_(model)


@pytest.mark.parametrize(
    "name", ["another dtype", "another shape", "layer missing", "buffers missing"]
)
def test_what_does_not_fit_is_refused_without_the_base_check_too(name: str, path: Path) -> None:
    make, message = WRONG_BASES[name]
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        ff.load_delta(path).apply_(model, check_base=False)
    assert_state(model, before)


def test_applied_twice_is_refused(path: Path, tuned: ff.SparseTuning) -> None:
    delta, base = ff.load_delta(path), Net()
    delta.apply_(base)
    for options in ({}, {"check_base": False}):
        with pytest.raises(RuntimeError, match="on the model already; call revert_ first"):
            delta.apply_(base, **options)
    ff.load_delta(path).apply_(base)  # the same file, read again: nothing changes
    assert_state(base, state_of(tuned.model))


def test_what_the_delta_replaces_is_no_part_of_the_base(path: Path, tuned: ff.SparseTuning) -> None:
    """Masked weights and buffers that the file sets may hold anything before."""
    model = Net()
    with torch.no_grad():
        for name, found in mask_with_head(Net()).items():
            model.get_parameter(name).view(-1)[found.long()] = 7.0
        model.norm.running_mean += 1.0
    ff.load_delta(path).apply_(model)
    assert_state(model, state_of(tuned.model))


@pytest.mark.parametrize("value", [0.5, -0.0], ids=["another value", "sign of a zero"])
def test_a_buffer_that_the_delta_does_not_set_is_part_of_the_base(
    value: float, tmp_path: Path
) -> None:
    trained_in_eval_mode = Net().eval()
    tuned = ff.train_only(trained_in_eval_mode, mask_with_head(trained_in_eval_mode))
    ff.save_delta(tuned, tmp_path / "d")
    delta = ff.load_delta(tmp_path / "d")
    assert not delta.buffers
    model = Net()
    assert model.norm.running_mean[0] == 0
    model.norm.running_mean[0] = value
    with pytest.raises(ValueError, match="another base model: its weights or buffers differ"):
        delta.apply_(model)


def test_revert_without_apply_is_refused(path: Path) -> None:
    delta, base = ff.load_delta(path), Net()
    with pytest.raises(RuntimeError, match="this delta is not on the model: apply_ was not called"):
        delta.revert_(base)
    delta.apply_(base)
    with pytest.raises(RuntimeError, match="not on the model"):
        delta.revert_(copy.deepcopy(base))
    delta.revert_(base)
    with pytest.raises(RuntimeError, match="not on the model"):
        delta.revert_(base)


@pytest.mark.parametrize("what", ["weight", "buffer", "delta on top"])
def test_revert_that_is_not_on_top_is_refused(what: str, path: Path, tmp_path: Path) -> None:
    delta, base = ff.load_delta(path), Net()
    delta.apply_(base)
    if what == "weight":
        entry = int(delta.mask["conv.weight"][0])
        with torch.no_grad():
            base.conv.weight.view(-1)[entry] += 1
    elif what == "buffer":
        base.norm.running_var[0] += 1
    else:
        model = Net()
        other = ff.train_only(model, mask_with_head(model, seed=1))
        train(other, 1)
        ff.save_delta(other, tmp_path / "other")
        ff.load_delta(tmp_path / "other").apply_(base, check_base=False)
    before = state_of(base)
    with pytest.raises(RuntimeError, match="the delta is not on top: .* undo that first"):
        delta.revert_(base)
    assert_state(base, before)


def test_delta_of_names_that_the_model_lacks(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    tuned = ff.train_only(model, mask_of(model, {"weight": some_indices(6)}))
    ff.save_delta(tuned, tmp_path / "d")
    other = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="it names 'weight', which the model does not have"):
        ff.load_delta(tmp_path / "d").apply_(other, check_base=False)
