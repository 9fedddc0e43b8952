"""`SparseMask`: a mapping, a fingerprint, texts, and the models that it fits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch
from small_mask import FINGERPRINT, INDICES, SHAPES, small_mask
from torch import nn

import fishfast as ff

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
