"""Bad files of deltas; a refused file changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from delta_damage import (
    add_tensor,
    append,
    content,
    edit_entry,
    edit_metadata,
    edit_shapes,
    move_index,
    name_metadata_twice,
    name_twice,
    put_together,
    rename,
    repeat_first_index,
    set_index,
    set_value,
    signed,
    split_last_value,
    swap_indices,
    take_apart,
    truncate,
)
from delta_net import Net
from stepping import assert_state, state_of

import fishfast as ff

DEEP = "[" * 100_000
BAD_SHAPE = "the shape of 'conv.weight' must be whole numbers >= 0; got"

BAD_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "name twice": (name_twice, "names 'values/conv.bias' twice in its header"),
    "metadata twice": (name_metadata_twice, "names 'format_version' twice in its header"),
    "negative index": (signed(set_index(0, -1)), "indices of 'conv.weight' reach from -1"),
    "index too large": (
        signed(set_index(-1, 108)),
        "'conv.weight' reach from .* to 108 in a tensor of 108",
    ),
    "largest index": (
        signed(set_index(-1, 2**31 - 1)),
        "'conv.weight' reach from .* to 2147483647",
    ),
    "index twice": (
        signed(repeat_first_index),
        "indices of 'conv.weight' are not strictly ascending",
    ),
    "unsorted": (signed(swap_indices), "indices of 'conv.weight' are not strictly ascending"),
    "another index": (signed(move_index), "does not match its fingerprint: the file is damaged"),
    "NaN": (signed(set_value("values/conv.bias", torch.nan)), "must be finite; 'conv.bias' in "),
    "infinite": (
        signed(set_value("values/conv.bias", -torch.inf)),
        "must be finite; 'conv.bias' in ",
    ),
    "NaN in a buffer": (
        signed(set_value("buffer/norm.running_var", torch.nan)),
        "must be finite; 'norm.running_var' in ",
    ),
    "lengths disagree": (
        signed(split_last_value),
        "holds 32 indices and 31 values of 'conv.weight'",
    ),
    "indices are floats": (
        signed(edit_entry("indices/conv.weight", dtype="F32")),
        "indices of 'conv.weight' are torch.float32",
    ),
    "indices of two dimensions": (
        signed(edit_entry("indices/conv.weight", shape=[4, 8])),
        r"indices of 'conv.weight' are torch.int32 of shape \(4, 8\)",
    ),
    "values are integers": (
        signed(edit_entry("values/conv.weight", dtype="I32")),
        "values must be floating; 'conv.weight' has torch.int32",
    ),
    "values of two dimensions": (
        signed(edit_entry("values/conv.weight", shape=[4, 8])),
        "32 indices and",
    ),
    "values without indices": (
        signed(rename("indices/conv.weight", "buffer/conv")),
        "only one of them for 'conv.weight'",
    ),
    "indices without values": (
        signed(rename("values/conv.weight", "buffer/conv")),
        "only one of them for 'conv.weight'",
    ),
    "extra tensor": (signed(add_tensor("more")), "holds 'more', which is no part of a delta"),
    "values of a parameter without a shape": (
        edit_metadata(shapes='{"conv.weight": [4, 3, 3, 3]}'),
        "missing",
    ),
    "another number of weights": (edit_shapes(conv=[4, 3, 3, 4]), "does not match its fingerprint"),
    "negative dimension": (edit_shapes(conv=[-4, -27]), BAD_SHAPE),
    "dimension of another type": (edit_shapes(conv=[108.0]), BAD_SHAPE),
    "dimensions as a string": (edit_shapes(conv="108"), BAD_SHAPE),
    "dimensions in a list": (edit_shapes(conv=[[108]]), BAD_SHAPE),
    "dimension true": (edit_shapes(conv=[True, 108]), BAD_SHAPE),
    "one number as shape": (edit_shapes(conv=108), "broken header"),
    "shapes are no JSON": (edit_metadata(shapes="{"), "broken header"),
    "shapes are a list": (edit_metadata(shapes="[1]"), "broken header"),
    "shapes too deep": (edit_metadata(shapes=DEEP), "broken header"),
    "no shapes": (edit_metadata(shapes=None), "broken header: KeyError"),
    "ties are a list": (edit_metadata(base_ties="[1]"), "broken header: .*values"),
    "ties to a number": (edit_metadata(base_ties='{"a": 1}'), "broken header: .*base_ties"),
    "other names are numbers": (edit_metadata(base_others="[1]"), "broken header: .*base_others"),
    "other names are an entry": (edit_metadata(base_others='{"a": 1}'), "broken header: .*others"),
    "no other names": (edit_metadata(base_others=None), "broken header: KeyError"),
    "no base": (edit_metadata(base_content=None), "broken header: KeyError"),
    "newer version": (edit_metadata(format_version="3"), "has format_version '3'; .* upgrade"),
    "unknown version": (edit_metadata(format_version="one"), "has format_version 'one'"),
    "no version": (edit_metadata(format_version=None), "has format_version None"),
    "a mask": (edit_metadata(format="fishfast.mask"), "must be a fishfast.delta file"),
    "another program's": (edit_metadata(format="pt"), "must be a fishfast.delta file"),
    "truncated": (truncate, "is not a whole safetensors file"),
    "something appended": (append, "is not a whole safetensors file"),
    "empty": (content(b""), "is not a whole safetensors file"),
    "five bytes": (content(b"hello"), "is not a whole safetensors file"),
    "text": (content(b"what is this? no delta, surely"), "is not a whole safetensors file"),
    "header too deep": (
        lambda path: put_together(path, DEEP, b""),
        "is not a whole safetensors file",
    ),
    "header in UTF-16": (
        lambda path: put_together(path, "{}".encode("utf-16"), b""),
        "is not a whole safetensors file",
    ),
    "type that torch lacks": (
        edit_entry("buffer/norm.num_batches_tracked", dtype="C64X"),
        "is not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused(name: str, path: Path) -> None:
    damage, message = BAD_FILES[name]
    ff.load_delta(path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        ff.load_delta(path)


# Whole files that a model must refuse.
MISFITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "base of other values": (edit_metadata(base_content="0" * 64), "weights or buffers differ"),
    "base of another structure": (edit_metadata(base_structure="0" * 64), "dtypes or ties differ"),
    "values of another dtype": (
        signed(edit_entry("values/conv.weight", dtype="I32")),
        "values must be floating",
    ),
    "unknown buffer": (signed(add_tensor("buffer/norm.more")), "it sets the buffer 'norm.more'"),
    "buffer of another shape": (
        signed(edit_entry("buffer/norm.running_mean", shape=[2, 2])),
        "it sets the buffer 'norm.running_mean'",
    ),
}


def test_one_flipped_bit_is_noticed(path: Path) -> None:
    """Anywhere in the data: indices, values and buffers."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for position in range(start, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="does not match its checksum: the file is damaged"):
            ff.load_delta(path)


def test_a_missing_buffer_is_noticed(path: Path) -> None:
    header, data = take_apart(path)
    key = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
    assert key.startswith(("buffer/", "values/", "indices/"))
    start, _ = header.pop(key)["data_offsets"]
    put_together(path, header, data[:start])
    with pytest.raises(ValueError, match="does not match its checksum: the file is damaged"):
        ff.load_delta(path)


@pytest.mark.parametrize("name", MISFITS)
def test_file_that_does_not_fit_changes_nothing(name: str, path: Path) -> None:
    damage, message = MISFITS[name]
    damage(path)
    model = Net()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        ff.load_delta(path).apply_(model)
    assert_state(model, before)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ff.load_delta(tmp_path / "nowhere")
