"""Deltas and checkpoints on disk: bit-exact both ways, any other base refused, little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_damage import edit_metadata, put_together, take_apart
from delta_net import Net, mask_with_head, train, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stepping import assert_state, mask_of, state_of
from torch import Tensor, nn

import fishfast as ff
from fishfast import stored_tensors

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of more than 40 bytes takes several pieces, the last one not whole."""
    monkeypatch.setattr(stored_tensors, "_PIECE_BYTES", 40)


def checkpoint_of(model: nn.Module, *aliases: str) -> Tensors:
    """What a checkpoint has: a tied weight once, under its first name unless named here."""
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    dropped = {"again.weight": "first.weight"}
    for name, first in dropped.items():
        if name in state:
            del state[first if name in aliases else name]
    return state


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same_file(path: Path, expected: Tensors) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert raw(found[name]) == raw(tensor), name


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# --- any two checkpoints ---


def some_tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.10.weight": torch.randn(7, 5, generator=generator),
        "b.2.weight": torch.randn(3, 11, generator=generator).bfloat16(),
        "half": torch.randn(23, generator=generator).half(),
        "double": torch.randn(9, generator=generator).double(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "steps": torch.tensor(5),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(30).view(5, 6),
        "eight": torch.randn(12, generator=generator).to(torch.float8_e4m3fn),
        "norm.running_mean": torch.zeros(6),
    }


def changed_bits(base: Tensors) -> Tensors:
    """Change some of everything, and only by bits that comparison of numbers overlooks."""
    tuned = {name: t.clone() for name, t in base.items()}
    tuned["b.10.weight"].view(-1)[[0, 9, 10, 34]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    tuned["b.2.weight"].view(-1)[[19, 20]] += 1
    tuned["half"][22] = 7
    tuned["double"][0] = torch.nextafter(base["double"][0], torch.tensor(9.0).double())
    tuned["scalar"].fill_(-0.0)
    tuned["flags"][1] = True
    tuned["norm.running_mean"][2] = -0.0
    return tuned


CASES: dict[str, Callable[[Tensors], Tensors]] = {
    "nothing": lambda base: {name: t.clone() for name, t in base.items()},
    "some of everything": changed_bits,
    "all": lambda base: some_tensors(1),
}


@pytest.mark.parametrize("name", CASES)
def test_base_and_diff_give_tuned_again_bit_for_bit(name: str, tmp_path: Path) -> None:
    base = some_tensors()
    tuned = CASES[name](base)
    save_file(base, tmp_path / "base", {"format": "pt", "note": "ä"})
    save_file(tuned, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", allow_large=True)
    delta.save(tmp_path / "delta")
    done = ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert_same_file(tmp_path / "out", tuned)
    assert metadata_of(tmp_path / "out") == {"format": "pt", "note": "ä"}
    assert (done.num_tensors, done.num_selected) == (len(base), delta.num_selected)
    assert done.nbytes == sum(t.nbytes for t in base.values())
    assert not done.created
    assert not done.unknown


def test_diff_has_every_changed_entry_and_no_other(tmp_path: Path) -> None:
    base = some_tensors()
    tuned = changed_bits(base)
    save_file(base, tmp_path / "base")
    save_file(tuned, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")
    for name in ("b.10.weight", "b.2.weight", "half", "double", "scalar"):
        was, now = (np.frombuffer(raw(t[name]), np.uint8) for t in (base, tuned))
        differs = (was != now).reshape(base[name].numel(), -1).any(axis=1)
        assert delta.mask[name].tolist() == np.flatnonzero(differs).tolist(), name
    assert list(delta.mask)[:2] == ["b.2.weight", "b.10.weight"]  # 2 comes before 10
    assert set(delta.buffers) == {"flags", "norm.running_mean"}
    assert set(delta.base_others) == {"eight", "flags", "ids", "norm.running_mean", "steps"}
    assert delta.mask.num_params == 35 + 33 + 23 + 9 + 1


def test_nan_of_other_bits_is_seen_and_refused_and_equal_nan_is_none(tmp_path: Path) -> None:
    bits = torch.zeros(100, dtype=torch.int32)
    bits[3] = 0x7FC00000
    save_file({"w": bits.view(torch.float32)}, tmp_path / "base")
    bits[50] = 1
    save_file({"w": bits.view(torch.float32)}, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")
    assert delta.mask["w"].tolist() == [50]
    bits[3] += 1  # another payload
    save_file({"w": bits.view(torch.float32)}, tmp_path / "tuned")
    with pytest.raises(ValueError, match="values must be finite; 'w' in '.*tuned' has NaN"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")
    bits[3] = 0  # from NaN to a number
    save_file({"w": bits.view(torch.float32)}, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")
    delta.save(tmp_path / "delta")
    ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert_same_file(tmp_path / "out", load_file(tmp_path / "tuned"))


def test_buffer_of_eight_bit_floats_that_is_nan_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3).to(torch.float8_e5m2)}, tmp_path / "base")
    save_file({"w": torch.full((3,), torch.nan).to(torch.float8_e5m2)}, tmp_path / "tuned")
    with pytest.raises(ValueError, match="values must be finite; 'w'"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")


def test_named_buffers_are_replaced_whole(tmp_path: Path) -> None:
    base = {"ema.shadow": torch.zeros(50), "w": torch.zeros(50)}
    save_file(base, tmp_path / "base")
    base["ema.shadow"][4] = 1
    save_file(base, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", buffers="ema")
    assert list(delta.buffers) == ["ema.shadow"]
    assert list(delta.mask) == ["w"]
    with pytest.raises(ValueError, match="buffers entry 'emma' matches no parameter"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", buffers="emma")


LAYOUTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "more": (lambda t: t.update(z=torch.zeros(1)), r"only '.*tuned' has 'z'$"),
    "fewer": (lambda t: t.pop("ids"), r"only '.*base' has 'ids'$"),
    "other names": (
        lambda t: [t.update({f"x.{name}": t.pop(name)}) for name in list(t)],
        "only '.*base' has 'b.2.weight', 'b.10.weight', 'double' and 8 more; only '.*tuned' has "
        "'x.b.2.weight', 'x.b.10.weight', 'x.double' and 8 more$",
    ),
    "shape": (
        lambda t: t.update(half=torch.zeros(1, 23).half()),
        r"'half' is torch.float16 of shape \(23,\) in the base and torch.float16 of shape \(1, 23",
    ),
    "dtype": (
        lambda t: t.update(half=torch.zeros(23)),
        "'half' is torch.float16 .* and torch.float32 ",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_diff_of_other_names_shapes_or_dtypes_is_refused(name: str, tmp_path: Path) -> None:
    change, message = LAYOUTS[name]
    save_file(some_tensors(), tmp_path / "base")
    tuned = some_tensors()
    change(tuned)
    save_file(tuned, tmp_path / "tuned")
    with pytest.raises(ValueError, match=f"must have the same names, shapes and dtypes; {message}"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")


def test_a_delta_larger_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(100)}, tmp_path / "base")
    changed = {"w": (torch.arange(100) < 50).float()}
    save_file(changed, tmp_path / "tuned")
    assert ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned").num_selected == 50
    changed["w"][50] = 1
    save_file(changed, tmp_path / "tuned")
    message = "must be smaller than '.*tuned', which has 400 bytes; it has more already at 'w'"
    with pytest.raises(ValueError, match=message):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")


# --- models and their checkpoints ---


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


def test_diff_goes_on_a_model_and_off(tmp_path: Path) -> None:
    save_file(checkpoint_of(Net()), tmp_path / "base")
    tuned = trained()
    save_file(checkpoint_of(tuned.release()), tmp_path / "tuned")
    ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", allow_large=True).save(
        tmp_path / "delta"
    )
    delta, model = ff.load_delta(tmp_path / "delta"), Net()
    delta.apply_(model)
    assert_state(model, state_of(tuned.model))
    delta.revert_(model)
    assert_state(model, state_of(Net()))


def test_a_float_buffer_that_did_not_change_may_be_taken_for_a_parameter(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(40, 3)
        model.register_buffer("frequencies", torch.arange(5.0))
        return model

    model = make()
    save_file(model.state_dict(), tmp_path / "base")
    with torch.no_grad():
        model.weight[0, 0] += 1
    save_file(model.state_dict(), tmp_path / "tuned")
    other = make()
    ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned").apply_(other)
    assert_state(other, state_of(model))
    model.frequencies[0] = 9
    save_file(model.state_dict(), tmp_path / "tuned")
    with pytest.raises(ValueError, match="it names 'frequencies', which the model does not have"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned").apply_(make())
    other = make()
    ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", buffers="frequencies").apply_(other)
    assert_state(other, state_of(model))


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


def unmasked(base: Tensors) -> None:
    masked = set(mask_with_head(Net())["conv.weight"].tolist())
    index = next(i for i in range(108) if i not in masked)
    base["conv.weight"].view(-1)[index] *= 1.0001


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
    load = ff.checkpoints.apply.load_delta

    def load_late(where: Path) -> ff.Delta:
        save_file(checkpoint_of(Net(head_seed=1)), tmp_path / "base")
        return load(where)

    monkeypatch.setattr(ff.checkpoints.apply, "load_delta", load_late)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- folders ---


def save_folder(folder: Path, tensors: Tensors, num_shards: int) -> None:
    """As transformers does: shards and an index, and other files beside them."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "deep").mkdir()
    (folder / "deep" / "vocab.txt").write_text("a b")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for number in range(num_shards):
        file_name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        part = names[number::num_shards]
        save_file({n: tensors[n] for n in part}, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size, "x": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_folder(folder: Path) -> Tensors:
    """Read by the index where there is one, as transformers does."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in weight_map.items()}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_folder_is_mirrored(num_shards: int, tmp_path: Path) -> None:
    tuned = trained()
    ff.save_delta(tuned, tmp_path / "delta")
    base = checkpoint_of(Net())
    del base["head.bias"]
    save_folder(tmp_path / "base", base, num_shards)
    done = ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    expected = checkpoint_of(tuned.release())
    found = load_folder(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(raw(found[name]) == raw(tensor) for name, tensor in expected.items())
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    shards = {p.name for p in (tmp_path / "base").glob("model*")}
    assert files == {"config.json", "deep", "deep/vocab.txt", *shards}
    assert done.left_out == ("pytorch_model.bin",)
    assert done.created == ("head.bias",)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert metadata_of(shard) == {"format": "pt"}
    if num_shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        size = sum(t.nbytes for t in expected.values())
        assert index["metadata"] == {"total_size": size, "x": 1}
        assert index["weight_map"].keys() == expected.keys()
    other = ff.diff_checkpoints(tmp_path / "out", tmp_path / "out")
    assert other.num_selected == 0


def test_a_folder_of_links_as_in_a_download_cache(tmp_path: Path) -> None:
    save_folder(tmp_path / "real", checkpoint_of(Net()), 2)
    (tmp_path / "base").mkdir()
    for place in (tmp_path / "real").glob("*.*"):
        if place.is_file():
            (tmp_path / "base" / place.name).symlink_to(place)
    ff.save_delta(trained(), tmp_path / "delta")
    ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert not any(place.is_symlink() for place in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "config.json").exists()


def test_a_folder_that_is_there_already_or_inside_is_refused(path: Path, tmp_path: Path) -> None:
    save_folder(tmp_path / "base", checkpoint_of(Net()), 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="must not exist yet, or be an empty folder"):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")
    for out in ("base/out", "base/deep/out"):
        with pytest.raises(ValueError, match="out must not be inside the base's folder"):
            ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / out)
    with pytest.raises(ValueError, match="out must not be the base itself"):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "base")
    (tmp_path / "out" / "mine").unlink()
    ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")


def test_a_refused_folder_leaves_nothing(path: Path, tmp_path: Path) -> None:
    base = checkpoint_of(Net())
    unmasked(base)
    save_folder(tmp_path / "base", base, 2)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="weights or buffers differ"):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


def edit_index(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def repeat_tensor(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | {"again.bias": torch.zeros(1)}, path)


FIRST = "model-00001-of-00002.safetensors"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no shard": (drop_shard, FileNotFoundError, "model-00002-of-00002"),
    "tensor twice": (repeat_tensor, ValueError, "must hold every tensor once; 'again.bias' is in"),
    "other place": (
        edit_index(weight_map={"again.bias": FIRST, "nowhere": FIRST}),
        ValueError, "00001-of-00002.safetensors' must hold 'nowhere', as its index says",
    ),
    "no map": (edit_index(weight_map=None), ValueError, "is a broken index"),
    "map to a number": (edit_index(weight_map={"a": 1}), ValueError, "is a broken index"),
    "map elsewhere": (edit_index(weight_map={"a": "../x"}), ValueError, "is a broken index"),
    "metadata a list": (edit_index(metadata=[]), ValueError, "is a broken index"),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        ValueError, "must have model.safetensors, .* found: model-00001-of-00002.safetensors, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folder(name: str, path: Path, tmp_path: Path) -> None:
    damage, kind, message = BAD_FOLDERS[name]
    save_folder(tmp_path / "base", checkpoint_of(Net()), 2)
    damage(tmp_path / "base")
    with pytest.raises(kind, match=message):
        ff.apply_to_checkpoint(tmp_path / "base", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found: none"):
        ff.diff_checkpoints(tmp_path / "empty", tmp_path / "empty")
    folder = tmp_path / "one"
    folder.mkdir()
    save_file({"w": torch.zeros(2)}, folder / "diffusion_pytorch_model.safetensors")
    assert list(ff.diff_checkpoints(folder, folder).mask) == ["w"]
    save_file({"v": torch.zeros(2)}, folder / "model.safetensors")
    assert list(ff.diff_checkpoints(folder, folder).mask) == ["v"]


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


# --- memory ---

PROGRAM = """
import re, sys
from fishfast import apply_to_checkpoint, diff_checkpoints

def memory(kind):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(kind + r":\\s+(\\d+)", file.read())[1])

small, base, tuned, delta, out = sys.argv[1:]
diff_checkpoints(small, small).save(delta)  # what is loaded late is there
apply_to_checkpoint(small, delta, out)
before = memory("VmRSS")
diff_checkpoints(base, tuned).save(delta)
apply_to_checkpoint(base, delta, out)
print(memory("VmHWM") - before)
"""


def test_peak_memory_is_some_pieces(tmp_path: Path) -> None:
    """A checkpoint of 120 MB, one tensor of 100: far from either in memory."""
    base = {"large": torch.arange(25_000_000, dtype=torch.int32).view(torch.float32),
            "more": torch.ones(5_000_000)}  # fmt: skip
    save_file({"w": torch.zeros(1000)}, tmp_path / "small")
    save_file(base, tmp_path / "base")
    base["large"][::500] += 1
    base["more"][-1] = 0
    save_file(base, tmp_path / "tuned")
    paths = [str(tmp_path / name) for name in ("small", "base", "tuned", "delta", "out")]
    result = subprocess.run([sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 40e6
    assert (tmp_path / "out").read_bytes() == (tmp_path / "tuned").read_bytes()


def test_training_a_delta_from_a_diff(tmp_path: Path) -> None:
    """Its mask is one to train with."""
    save_file(checkpoint_of(Net()), tmp_path / "base")
    save_file(checkpoint_of(trained().release()), tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", allow_large=True)
    model = Net()
    tuned = ff.train_only(model, delta.mask)
    train(tuned, 1)
    assert tuned.num_selected == delta.num_selected
