"""A base on disk and a delta give the tuned checkpoint, bit for bit; any other base is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Tensors, assert_same_file, checkpoint_of, unmasked
from delta_damage import edit_metadata, put_together, take_apart
from delta_net import Net, trained
from safetensors.torch import load_file, save_file
from stepping import assert_state, mask_of, state_of
from torch import nn

import fishfast as ff


@pytest.fixture(autouse=True)
def _small_pieces(pieces_of_40_bytes: None) -> None:
    """Every tensor of more than 40 bytes takes several pieces, the last one not whole."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kept", ["first", "again"], ids=["first name", "other name"])
def test_apply_equals_the_library(dtype: torch.dtype, kept: str, tmp_path: Path) -> None:
    """Conv, norm with buffers, a tied pair under either name, and a head masked whole."""
    alias = ["again.weight"] if kept == "again" else []
    save_file(checkpoint_of(Net().to(dtype), *alias), tmp_path / "base")
    tuned = trained(dtype)
    ff.save_delta(tuned, tmp_path / "delta")
    tuned.release()
    model = ff.load_delta(tmp_path / "delta").apply_(Net(head_seed=9).to(dtype))
    assert_state(model, state_of(tuned.model))
    done = ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert_same_file(tmp_path / "out", checkpoint_of(model, *alias))
    assert done.num_selected == tuned.num_selected


def test_the_same_base_and_delta_give_the_same_bytes(path: Path, tmp_path: Path) -> None:
    """Of a header with many entries too, which are read in another order every time."""
    metadata = {f"entry {number}": "x" for number in range(20)}
    save_file(checkpoint_of(Net()), tmp_path / "base", metadata)
    contents = set()
    for _ in range(3):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")
        contents.add((tmp_path / "out").read_bytes())
    assert len(contents) == 1


def test_what_only_the_delta_has_is_added_and_what_only_the_base_has_is_kept(
    tmp_path: Path,
) -> None:
    """A pre-trained checkpoint: no head yet, no statistics, and another task's head."""
    tuned = trained(torch.bfloat16)
    ff.save_delta(tuned, tmp_path / "delta")
    base = checkpoint_of(Net().to(torch.bfloat16))
    for name in ("head.weight", "head.bias", "norm.running_mean", "norm.num_batches_tracked"):
        del base[name]
    base["cls.weight"] = torch.randn(3, 3).bfloat16()
    save_file(base, tmp_path / "base")
    done = ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    expected = checkpoint_of(tuned.release()) | {"cls.weight": base["cls.weight"]}
    assert_same_file(tmp_path / "out", expected)
    assert set(done.created) == {
        "head.weight", "head.bias", "norm.running_mean", "norm.num_batches_tracked",
    }  # fmt: skip
    assert done.unknown == ("cls.weight",)
    header, _ = take_apart(tmp_path / "out")
    sizes = {"BF16": 2, "I64": 8}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    assert {entry["dtype"] for entry in entries} == set(sizes)
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in entries)
    assert done.num_tensors == len(expected)
    assert done.nbytes == sum(t.nbytes for t in expected.values())


# --- what is refused, with nothing written ---


WRONG_BASES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "one weight": (unmasked, "another base model: its weights or buffers differ"),
    "a layer missing": (
        lambda t: [t.pop("conv.weight"), t.pop("norm.bias")],
        r"'conv.weight', 'norm.bias' of its model are not in '.*base'; weights that",
    ),
    "another prefix": (
        lambda t: t.update({"m.conv.weight": t.pop("conv.weight")}),
        r"'conv.weight' of its model is not in '.*base', which has 'm.conv.weight' instead; ",
    ),
    "another shape": (
        lambda t: t.update({"conv.weight": t["conv.weight"].view(-1)}),
        r"'conv.weight' is torch.float32 of shape \(4, 3, 3, 3\) in the delta and torch.float32 of "
        r"shape \(108,\) in the base",
    ),
    "another dtype": (
        lambda t: t.update({"head.bias": t["head.bias"].half()}),
        "'head.bias' is torch.float32 .* in the delta and torch.float16 ",
    ),
    "a buffer of another dtype": (
        lambda t: t.update({"norm.running_var": t["norm.running_var"].half()}),
        "'norm.running_var' is torch.float32 .* in the delta and torch.float16 ",
    ),
    "tied weights that differ": (
        lambda t: t.update({"again.weight": t["first.weight"] + 1}),
        "'first.weight' is one weight of several names",
    ),
}


@pytest.mark.parametrize("name", WRONG_BASES)
def test_another_base_is_refused(name: str, path: Path, tmp_path: Path) -> None:
    change, message = WRONG_BASES[name]
    base = checkpoint_of(Net())
    change(base)
    save_file(base, tmp_path / "base")
    (tmp_path / "out").write_bytes(b"before")
    files = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=message):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == files


def test_another_dtype_where_the_delta_changes_nothing_is_another_structure(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    save_file({n: t.double() if n[0] == "1" else t for n, t in model.state_dict().items()},
              tmp_path / "base")  # fmt: skip
    mask = {n: torch.arange(2 if n[0] == "0" else 0) for n, _ in model.named_parameters()}
    ff.save_delta(ff.train_only(model, mask_of(model, mask)), tmp_path / "delta")
    with pytest.raises(ValueError, match="its names, shapes, dtypes or ties differ"):
        ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    ff.apply_to_checkpoint(
        tmp_path / "base", tmp_path / "delta", tmp_path / "out", check_base=False
    )
    assert (tmp_path / "out").exists()


def test_base_check_can_be_left_out(path: Path, tmp_path: Path, tuned: ff.SparseTuning) -> None:
    base = checkpoint_of(Net())
    unmasked(base)
    save_file(base, tmp_path / "base")
    ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out", check_base=False)
    found, expected = load_file(tmp_path / "out"), checkpoint_of(tuned.model)
    differs = (found["conv.weight"] != expected["conv.weight"]).sum()
    assert differs == 1
    assert torch.equal(found["head.weight"], expected["head.weight"])


def test_out_must_not_be_the_base_or_the_delta(path: Path, tmp_path: Path) -> None:
    save_file(checkpoint_of(Net()), tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    os.link(tmp_path / "base", tmp_path / "hard")
    before = (tmp_path / "base").read_bytes()
    for out, what in (("base", "base"), ("link", "base"), ("hard", "base"), (path, "delta")):
        with pytest.raises(ValueError, match=f"out must not be the {what} itself"):
            ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / out)
    assert (tmp_path / "base").read_bytes() == before


def test_a_base_that_changes_meanwhile_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(checkpoint_of(Net()), tmp_path / "base")
    load = ff.delta.apply.load_delta

    def load_late(where: Path) -> ff.Delta:
        save_file(checkpoint_of(Net(head_seed=1)), tmp_path / "base")
        return load(where)

    monkeypatch.setattr(ff.delta.apply, "load_delta", load_late)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_base(path: Path, tmp_path: Path) -> None:
    save_file(checkpoint_of(Net()), tmp_path / "base")
    whole = (tmp_path / "base").read_bytes()
    (tmp_path / "base").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")
    (tmp_path / "base").write_bytes(whole)
    header, data = take_apart(tmp_path / "base")
    entry = json.dumps(header["conv.bias"])
    put_together(tmp_path / "base", json.dumps(header)[:-1] + f', "conv.bias": {entry}}}', data)
    with pytest.raises(ValueError, match="names a tensor twice|not a whole safetensors file"):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")


def test_a_delta_of_a_tie_that_is_none_of_the_base(path: Path, tmp_path: Path) -> None:
    edit_metadata(base_ties="{}")(path)
    save_file(checkpoint_of(Net()), tmp_path / "base")
    ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")  # a file knows no ties
    with pytest.raises(ValueError, match="names, shapes, dtypes or ties differ"):
        ff.load_delta(path).apply_(Net())


@pytest.mark.parametrize("training", [False, True], ids=["buffers stay", "buffers change"])
@pytest.mark.parametrize("both", [False, True], ids=["first name", "both names"])
def test_a_module_that_is_used_twice(training: bool, both: bool, tmp_path: Path) -> None:
    """Its parameters and buffers have two names each, of which a checkpoint has one or both."""

    def make() -> nn.Module:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model.append(model[1])
        return model.train(training)

    model = make()
    tuned = ff.train_only(model, ff.random_mask(model, density=0.3, seed=0))
    optimizer = ff.AdamW(tuned.parameters(), lr=0.1)
    model(torch.randn(6, 4)).square().sum().backward()
    optimizer.step()
    ff.save_delta(tuned, tmp_path / "delta")
    assert bool(ff.load_delta(tmp_path / "delta").buffers) == training

    def stored(model: nn.Module) -> Tensors:
        state = {name: t.detach().clone() for name, t in model.state_dict().items()}
        return {name: t for name, t in state.items() if both or not name.startswith("2.")}

    save_file(stored(make()), tmp_path / "base")
    done = ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert_same_file(tmp_path / "out", stored(tuned.release()))
    assert not done.unknown
    assert not done.created
