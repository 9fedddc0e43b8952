"""The file of a `SparseMask`, written whole or not at all and read with suspicion."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from small_mask import small_mask

import fishfast as ff


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
@pytest.mark.parametrize("num_zero_score", [None, 0, 7])
def test_save_and_load(tmp_path, as_path, num_zero_score):
    path = as_path(tmp_path / "mask.safetensors")
    mask = small_mask(num_zero_score)
    mask.save(path)
    loaded = ff.SparseMask.load(path)
    assert loaded == mask
    assert list(loaded) == list(mask)
    assert (loaded.shapes, loaded.num_zero_score) == (mask.shapes, num_zero_score)
    assert all(torch.equal(loaded[n], mask[n]) and loaded[n].dtype == mask[n].dtype for n in mask)


def test_a_mask_of_one_flat_buffer_is_saved_tensor_by_tensor(tmp_path):
    scores = {f"ünïcode.{i}": torch.rand(i % 5) for i in range(40)}
    mask = ff.top_k_mask(scores, density=0.4)
    mask.save(tmp_path / "mask")
    assert ff.SparseMask.load(tmp_path / "mask") == mask


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "mask"
    small_mask().save(path)

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("fishfast.files.atomic.os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ff.SparseMask({}, {"other": (3,)}).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["mask"]
    assert ff.SparseMask.load(path) == small_mask()


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ff.SparseMask.load(tmp_path / "none")


def write(path, tensors, metadata, header_text=None):
    """Write a safetensors file byte by byte: wrong in any way that is asked for, well signed."""
    checksum = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        checksum.update(json.dumps([name, f"torch.{array.dtype}", list(array.shape)]).encode())
        checksum.update(array.tobytes())
    header, data = {"__metadata__": {"sha256": checksum.hexdigest(), **metadata}}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        kind = {"int32": "I32", "int64": "I64", "float32": "F32"}[str(array.dtype)]
        header[name] = {
            "dtype": kind, "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    text = (header_text or json.dumps)(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def good_parts():
    mask = small_mask()
    metadata = {
        "format": "fishfast.mask",
        "format_version": "1",
        "shapes": json.dumps({"a.weight": [2, 3], "a.bias": [3], "scale": []}),
        "fingerprint": mask.fingerprint,
        "num_zero_score": "null",
    }
    return {name: found.numpy() for name, found in mask.items()}, metadata


def test_the_hand_written_file_is_good(tmp_path):
    write(tmp_path / "mask", *good_parts())
    assert ff.SparseMask.load(tmp_path / "mask") == small_mask()


@pytest.mark.parametrize("checksum", ["0" * 64, ""], ids=["wrong", "empty"])
def test_a_wrong_checksum_is_refused(tmp_path, checksum):
    tensors, metadata = good_parts()
    write(tmp_path / "mask", tensors, {**metadata, "sha256": checksum})
    with pytest.raises(ValueError, match="does not match its checksum: the file is damaged"):
        ff.SparseMask.load(tmp_path / "mask")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        pytest.param([0, -2, 5], "reach from -2 to 5 in a tensor of 6", id="negative"),
        pytest.param([0, 2, 6], "reach from 0 to 6 in a tensor of 6", id="out-of-range"),
        pytest.param([2, 0, 5], "not strictly ascending", id="unsorted"),
        pytest.param([0, 2, 2], "not strictly ascending", id="duplicate"),
        pytest.param([[0, 2, 5]], "not a vector", id="matrix"),
        pytest.param([0, 2, 4], "does not match its fingerprint", id="other-index"),
        pytest.param([0, 2], "does not match its fingerprint", id="one-missing"),
    ],
)
def test_files_with_bad_indices_are_refused(tmp_path, wrong, text):
    tensors, metadata = good_parts()
    tensors["a.weight"] = np.array(wrong, dtype=np.int32)
    write(tmp_path / "mask", tensors, metadata)
    with pytest.raises(ValueError, match=text):
        ff.SparseMask.load(tmp_path / "mask")


def test_files_with_floating_indices_are_refused(tmp_path):
    tensors, metadata = good_parts()
    tensors["a.weight"] = tensors["a.weight"].astype(np.float32)
    write(tmp_path / "mask", tensors, metadata)
    with pytest.raises(ValueError, match="torch.float32 of shape"):
        ff.SparseMask.load(tmp_path / "mask")


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("format", "fishfast.delta", "a fishfast.mask file; its format is 'fishfast.delta'"),
        ("format", None, "must be a fishfast.mask file; it is like a model's checkpoint"),
        ("format_version", "2", "has format_version '2'; this fishfast reads version 1"),
        ("format_version", "one", "has format_version 'one'"),
        ("format_version", None, "has format_version None"),
        ("fingerprint", "0" * 64, "does not match its fingerprint"),
        ("fingerprint", None, "does not match its fingerprint"),
        ("shapes", None, "has a broken header"),
        ("shapes", "{", "has a broken header"),
        ("shapes", "[1, 2]", "has a broken header"),
        ("shapes", "null", "has a broken header"),
        ("shapes", '{"a.weight": 6, "a.bias": [3], "scale": []}', "has a broken header"),
        ("shapes", '{"a.weight": "23", "a.bias": [3], "scale": []}', "has a broken header"),
        ("shapes", '{"a.weight": [2, "3"], "a.bias": [3], "scale": []}', "has a broken header"),
        ("shapes", '{"a.weight": [-2, -3], "a.bias": [3], "scale": []}', "has a broken header"),
        ("shapes", '{"a.weight": [2.0, 3], "a.bias": [3], "scale": []}', "has a broken header"),
        ("shapes", '{"a.bias": [3], "scale": []}', r"missing \['a.weight'\]"),
        ("shapes", '{"a.weight": [2, 3], "a.weight": [2, 3], "a.bias": [3], "scale": []}',
         "has a broken header.*twice"),
        ("shapes", "[" * 100_000, "has a broken header"),
        ("num_zero_score", None, "has a broken header"),
        ("num_zero_score", "many", "has a broken header"),
        ("num_zero_score", '"many"', "has a broken header"),
        ("num_zero_score", "-1", "has a broken header"),
    ],
    ids=lambda value: None if value is None else value[:40],
)  # fmt: skip
def test_files_with_bad_headers_are_refused(tmp_path, entry, value, text):
    tensors, metadata = good_parts()
    metadata[entry] = value
    write(tmp_path / "mask", tensors, {n: v for n, v in metadata.items() if v is not None})
    with pytest.raises(ValueError, match=text):
        ff.SparseMask.load(tmp_path / "mask")


def test_a_name_twice_in_the_header_is_refused(tmp_path):
    def twice(header):
        entry = json.dumps(header["scale"])
        return json.dumps(header)[:-1] + f', "s\\u0063ale": {entry}}}'

    write(tmp_path / "mask", *good_parts(), header_text=twice)
    with pytest.raises(ValueError, match="names 'scale' twice in its header"):
        ff.SparseMask.load(tmp_path / "mask")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: raw[:5], id="no-header-length"),
        pytest.param(lambda raw: raw[:50], id="half-a-header"),
        pytest.param(lambda raw: raw[:-1], id="one-byte-short"),
        pytest.param(lambda raw: raw + b"\0", id="one-byte-more"),
        pytest.param(lambda raw: b"PK\3\4" + raw, id="another-kind"),
        pytest.param(lambda raw: struct.pack("<Q", 2**63) + raw[8:], id="header-of-2^63-bytes"),
        pytest.param(lambda raw: raw[:8] + b"\xff" + raw[9:], id="not-utf8"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "mask"
    small_mask().save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="mask' is not a whole safetensors file"):
        ff.SparseMask.load(path)


def test_every_flipped_bit_of_the_data_is_noticed(tmp_path):
    path = tmp_path / "mask"
    small_mask().save(path)
    raw = path.read_bytes()
    for place in range(len(raw) - 16, len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(ValueError, match="does not match its checksum: the file is damaged"):
            ff.SparseMask.load(path)
