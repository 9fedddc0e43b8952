"""Deltas on disk: k entries and little else; what is refused, and where they may be saved."""

from __future__ import annotations

import copy
import os
import pickletools
import zipfile
from pathlib import Path

import pytest
import torch
from delta_damage import take_apart
from delta_net import Net, images, mask_with_head, train, trained
from safetensors import safe_open
from stepping import assert_state, state_of

import fishfast as ff

# --- what is in the file ---


def test_file_holds_k_entries_and_little_else(path: Path, tuned: ff.SparseTuning) -> None:
    with safe_open(path, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        entries = sum(file.get_tensor(k).numel() for k in keys if k.startswith("values/"))
    assert entries == tuned.num_selected
    header = int.from_bytes(path.read_bytes()[:8], "little")
    buffers = 2 * 4 * 4 + 8  # running_mean, running_var, num_batches_tracked
    assert path.stat().st_size == 8 + header + 8 * tuned.num_selected + buffers
    assert metadata["format"] == "fishfast.delta"
    assert {key for key in keys if key.startswith("buffer/")} == {
        "buffer/norm.running_mean", "buffer/norm.running_var", "buffer/norm.num_batches_tracked",
    }  # fmt: skip


def test_file_has_no_pickle(path: Path) -> None:
    assert not zipfile.is_zipfile(path)
    with pytest.raises((ValueError, IndexError)):
        list(pickletools.genops(path.read_bytes()))
    for source in Path(ff.__file__).parent.rglob("*.py"):
        text = source.read_text()
        assert "torch.save" not in text, source
        assert "torch.load(" not in text, source
        assert "import pickle" not in text, source


def test_buffers_that_did_not_change_are_not_saved(tmp_path: Path) -> None:
    model = Net().eval()
    tuned = ff.train_only(model, mask_with_head(model))
    train(tuned)
    ff.save_delta(tuned, tmp_path / "d")
    delta = ff.load_delta(tmp_path / "d")
    assert not delta.buffers
    assert repr(delta).startswith(
        f"Delta({tuned.num_selected} of {tuned.mask.num_params} weights, 0"
    )


def test_saving_from_a_released_or_copied_model(path: Path, tmp_path: Path) -> None:
    tuned = trained()
    copied = copy.deepcopy(tuned)
    ff.save_delta(copied, tmp_path / "copied")
    tuned.release()
    ff.save_delta(tuned, tmp_path / "released")
    expected = take_apart(path)  # but for the order of the header, which safetensors leaves open
    assert take_apart(tmp_path / "copied") == expected
    assert take_apart(tmp_path / "released") == expected


# --- refusals; the old file stays ---


def test_save_refuses_what_is_no_tuning(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="tuned must be what train_only returned; got Net"):
        ff.save_delta(Net(), tmp_path / "d")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["weight", "buffer"])
def test_save_refuses_values_that_are_not_finite(path: Path, value: float, where: str) -> None:
    old = path.read_bytes()
    tuned = trained()
    if where == "weight":
        parameter = next(tuned.parameters())
        parameter.data[0] = value
        parameter.target.scatter_(parameter)
        message = r"values must be finite; 'conv\.weight_values' in the trained model"
    else:
        tuned.model.norm.running_mean[0] = value
        message = r"values must be finite; 'norm\.running_mean' in the trained model"
    with pytest.raises(ValueError, match=message):
        ff.save_delta(tuned, path)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_save_refuses_values_that_were_not_written_into_the_weights(path: Path) -> None:
    old = path.read_bytes()
    model = Net()
    tuned = ff.train_only(model, mask_with_head(model))
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"'conv.weight_values' were not written .*tuned.attach"):
        ff.save_delta(tuned, path)
    assert path.read_bytes() == old


def test_save_refuses_a_model_of_another_dtype(path: Path) -> None:
    old = path.read_bytes()
    tuned = trained()
    tuned.model.bfloat16()
    with pytest.raises(
        RuntimeError, match="changed since train_only, so the delta would fit no base"
    ):
        ff.save_delta(tuned, path)
    assert path.read_bytes() == old


def test_missing_folder_is_named(tuned: ff.SparseTuning, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        ff.save_delta(tuned, tmp_path / "missing" / "d")
    assert not list(tmp_path.iterdir())


def test_target_that_is_a_folder(tuned: ff.SparseTuning, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="must be a regular file or not exist"):
        ff.save_delta(tuned, tmp_path / "d")
    assert os.listdir(tmp_path) == ["d"]


def test_target_that_is_a_pipe_stays_one(tuned: ff.SparseTuning, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d")
    with pytest.raises(ValueError, match="must be a regular file or not exist"):
        ff.save_delta(tuned, tmp_path / "d")
    assert (tmp_path / "d").is_fifo()


def test_a_link_is_followed(tuned: ff.SparseTuning, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "d")
    ff.save_delta(tuned, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert ff.load_delta(tmp_path / "real" / "d").num_selected == tuned.num_selected


def test_mode_of_an_existing_file_is_kept(tuned: ff.SparseTuning, tmp_path: Path) -> None:
    (tmp_path / "d").touch(mode=0o600)
    ff.save_delta(tuned, tmp_path / "d")
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o600


def test_longest_file_name(tuned: ff.SparseTuning, tmp_path: Path) -> None:
    ff.save_delta(tuned, tmp_path / ("d" * 255))
    assert len(os.listdir(tmp_path)) == 1


# --- a delta that would not give the model again ---


def test_weights_trained_outside_the_mask_are_refused(tmp_path: Path) -> None:
    model = Net()
    mask = ff.random_mask(model, density=0.3, seed=0, exclude=["head"])
    tuned = ff.train_only(model, mask)
    model.head.weight.requires_grad_(True)
    optimizer = ff.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="weights outside the mask changed since train_only"):
        ff.save_delta(tuned, tmp_path / "d")
    assert not os.listdir(tmp_path)


def test_base_loaded_after_train_only_is_named_by_rebase(tmp_path: Path) -> None:
    pretrained = Net(head_seed=1)
    with torch.no_grad():
        for parameter in pretrained.parameters():
            parameter.mul_(1.5)
    model = Net()
    tuned = ff.train_only(model, mask_with_head(model))
    model.load_state_dict(pretrained.state_dict())
    with pytest.raises(RuntimeError, match=r"call tuned\.rebase\(\)"):
        ff.save_delta(tuned, tmp_path / "d")
    tuned.rebase()
    train(tuned)
    ff.save_delta(tuned, tmp_path / "d")
    with pytest.raises(ValueError, match="another base model"):
        ff.load_delta(tmp_path / "d").apply_(Net())
    ff.load_delta(tmp_path / "d").apply_(pretrained)
    assert_state(pretrained, state_of(model))


def test_resuming_from_a_trained_checkpoint_names_the_same_base(tmp_path: Path) -> None:
    model = trained().model
    resumed = Net()
    resumed.load_state_dict(model.state_dict())
    tuned = ff.train_only(resumed, mask_with_head(Net()))
    train(tuned)
    ff.save_delta(tuned, tmp_path / "d")
    base = Net()
    ff.load_delta(tmp_path / "d").apply_(base)
    assert_state(base, state_of(resumed))
