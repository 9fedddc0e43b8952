"""`SparseMask`: a mapping, a fingerprint, a file that is read with suspicion."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import struct
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

import fishfast as ff

INDICES = {
    "a.weight": torch.tensor([0, 2, 5], dtype=torch.int32),
    "a.bias": torch.tensor([], dtype=torch.int32),
    "scale": torch.tensor([0], dtype=torch.int32),
}
SHAPES = {"a.weight": (2, 3), "a.bias": (3,), "scale": ()}
FINGERPRINT = "8888224a604cf352c4a2fdbdfe49883b57eca4b8d4ddbca569693e69ac60e35e"


def small_mask(num_zero_score=None):
    return ff.SparseMask(INDICES, SHAPES, num_zero_score)


# ---- mapping ------------------------------------------------------------------------------------


def test_mask_is_a_mapping_over_every_scored_parameter():
    mask = small_mask(1)
    assert isinstance(mask, Mapping)
    assert list(mask) == ["a.weight", "a.bias", "scale"]
    assert len(mask) == 3
    assert "a.bias" in mask
    assert "b" not in mask
    assert mask["a.weight"].tolist() == [0, 2, 5]
    assert mask["a.bias"].tolist() == []
    assert (mask.num_params, mask.num_selected, mask.density) == (10, 4, 0.4)
    assert (mask.shapes, mask.num_zero_score) == (SHAPES, 1)
    with pytest.raises(KeyError):
        mask["b"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_are_copied(dtype):
    found = torch.tensor([0, 2], dtype=dtype)
    mask = ff.SparseMask({"w": found}, {"w": (4,)})
    found[0] = 1
    assert mask["w"].tolist() == [0, 2]


def test_parameters_without_indices_are_empty():
    mask = ff.SparseMask({}, {"w": (2, 2)})
    assert mask["w"].tolist() == []
    assert mask["w"].dtype == torch.int32
    assert (mask.num_selected, mask.density) == (0, 0.0)


def test_indices_are_int32_or_int64_by_the_size_of_the_parameter():
    last = torch.tensor([2**31 - 1])
    mask = ff.SparseMask({"b": last}, {"a": (2**31 - 1,), "b": (2**31,)})
    assert (mask["a"].dtype, mask["b"].dtype) == (torch.int32, torch.int64)


def test_a_mask_of_nothing():
    mask = ff.SparseMask({}, {})
    assert (len(mask), mask.num_params, mask.density) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([1, 0], "mask: the indices of 'w' are not strictly ascending"),
        ([1, 1], "mask: the indices of 'w' are not strictly ascending"),
        ([-1, 0], "mask: the indices of 'w' reach from -1 to 0 in a tensor of 4"),
        ([0, 4], "mask: the indices of 'w' reach from 0 to 4 in a tensor of 4"),
        (
            [0.0, 1.0],
            "mask: the indices of 'w' are torch.float32 of shape .* not a vector of int32",
        ),
        ([[0], [1]], r"mask: the indices of 'w' are torch.int64 of shape \(2, 1\), not a vector"),
        ([True, False], "mask: the indices of 'w' are torch.bool"),
    ],
)
def test_indices_that_do_not_fit_are_refused(indices, text):
    with pytest.raises(ValueError, match=text):
        ff.SparseMask({"w": torch.tensor(indices)}, {"w": (2, 2)})


def test_indices_without_a_shape_are_refused():
    with pytest.raises(ValueError, match=r"shapes must name every .*; missing \['b'\]"):
        ff.SparseMask({"b": torch.tensor([0])}, {"w": (2, 2)})


@pytest.mark.parametrize(
    "shape", [(-2, -2), (2.0, 2), ("2", 2), 4, "22", None, (True, 4)], ids=repr
)
def test_broken_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape of 'w' must be whole numbers >= 0; got"):
        ff.SparseMask({"w": torch.tensor([0])}, {"w": shape})


# ---- fingerprint and equality -------------------------------------------------------------------


def test_fingerprint_is_this_literal():
    """The fingerprint is written in files: it must never change."""
    assert small_mask().fingerprint == FINGERPRINT


def test_equal_masks_select_the_same_weights_of_the_same_shapes():
    wide = {name: found.to(torch.int64) for name, found in INDICES.items()}
    other = ff.SparseMask(wide, SHAPES, num_zero_score=2)
    assert small_mask() == other
    assert hash(small_mask()) == hash(other)
    assert len({small_mask(), other}) == 1


def test_equality_does_not_depend_on_the_order_of_the_parameters():
    names = list(reversed(SHAPES))
    turned = ff.SparseMask({n: INDICES[n] for n in names}, {n: SHAPES[n] for n in names})
    assert turned == small_mask()


@pytest.mark.parametrize(
    ("indices", "shapes"),
    [
        pytest.param({**INDICES, "a.weight": torch.tensor([0, 2, 4])}, SHAPES, id="index"),
        pytest.param(INDICES, {**SHAPES, "a.weight": (3, 2)}, id="shape"),
        pytest.param(INDICES, {**SHAPES, "other": (1,)}, id="one-more-name"),
        pytest.param(
            {"x": torch.tensor([0]), **{n: INDICES[n] for n in ("a.weight", "a.bias")}},
            {"x": (), "a.weight": (2, 3), "a.bias": (3,)}, id="name",
        ),
    ],
)  # fmt: skip
def test_other_masks_are_not_equal(indices, shapes):
    assert ff.SparseMask(indices, shapes) != small_mask()


def test_a_mask_is_not_equal_to_anything_else():
    assert small_mask() != INDICES.keys()
    assert small_mask() != FINGERPRINT
    assert small_mask() is not None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal(clone):
    mask = small_mask(3)
    mask.fingerprint  # noqa: B018 - cached now
    twin = clone(mask)
    assert twin == mask
    assert (twin.num_zero_score, twin.shapes) == (3, SHAPES)


# ---- text ---------------------------------------------------------------------------------------


def test_repr_says_how_much_and_which():
    assert repr(small_mask()) == (
        f"SparseMask(4 of 10 weights in 2 of 3 tensors, density 40%, fingerprint {FINGERPRINT[:8]})"
    )


def test_summary_is_a_table_of_every_parameter():
    rows = [line.split() for line in small_mask().summary().splitlines()]
    assert rows[0] == ["parameter", "shape", "selected", "density", "%"]
    assert rows[2:] == [
        ["a.weight", "2x3", "3", "50.000"],
        ["a.bias", "3", "0", "0.000"],
        ["scale", "scalar", "1", "100.000"],
        ["total", "10", "4", "40.000"],
    ]


# ---- files --------------------------------------------------------------------------------------


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

    monkeypatch.setattr("fishfast._files.os.replace", full_disk)
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
        ("format", None, "must be a fishfast.mask file; its format is None"),
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
        with pytest.raises(ValueError, match="mask: the indices|does not match its fingerprint"):
            ff.SparseMask.load(path)


# ---- the model ----------------------------------------------------------------------------------


def test_check_fits_accepts_a_model_with_more_parameters():
    mask = ff.random_mask(nn.Linear(3, 2), k=2, seed=0)
    mask.check_fits(nn.Linear(3, 2))
    model = nn.Linear(3, 2)
    model.extra = nn.Linear(2, 2)
    mask.check_fits(model)


def test_check_fits_refuses_missing_and_reshaped_parameters():
    mask = ff.random_mask(nn.Linear(3, 2), k=2, seed=0)
    with pytest.raises(ValueError, match="names 'bias', which the model does not have"):
        mask.check_fits(nn.Linear(3, 2, bias=False))
    with pytest.raises(
        ValueError, match=r"'weight' has shape \(2, 3\) in the mask and \(3, 2\) in the model"
    ):
        mask.check_fits(nn.Linear(2, 3))
