"""Folders of checkpoints, in shards or not, as transformers writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Tensors, checkpoint_of, metadata_of, raw, unmasked
from delta_net import Net, trained
from safetensors.torch import load_file, save_file

import fishfast as ff


@pytest.fixture(autouse=True)
def _small_pieces(pieces_of_40_bytes: None) -> None:
    """Every tensor of more than 40 bytes takes several pieces, the last one not whole."""


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
    (folder / SECOND).unlink()


def repeat_tensor(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | {"again.bias": torch.zeros(1)}, path)


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no shard": (
        drop_shard, FileNotFoundError,
        r"index.json' names 'model-00002-of-00002.safetensors', which must be beside it",
    ),
    "a folder for a shard": (
        lambda folder: (drop_shard(folder), (folder / SECOND).mkdir()),
        ValueError, "00002-of-00002.safetensors' must be a regular file",
    ),
    "tensor twice": (repeat_tensor, ValueError, "must hold every tensor once; 'again.bias' is in"),
    "other place": (
        edit_index(weight_map={"again.bias": FIRST, "nowhere": FIRST}),
        ValueError, "00001-of-00002.safetensors' must hold 'nowhere', as its index says",
    ),
    "no map": (edit_index(weight_map=None), ValueError, "is a broken index"),
    "map to a number": (edit_index(weight_map={"a": 1}), ValueError, "is a broken index"),
    "map to nothing": (edit_index(weight_map={"a": ""}), ValueError, "must name files beside it"),
    "map of nothing": (edit_index(weight_map={}), ValueError, "must name at least one tensor"),
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
