"""The rules of `top_k_mask`: how many weights, how they are shared, what is kept and excluded."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from topk_cases import BACKENDS, few_values, model_scores

import fishfast as ff

# ---- budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "density", "k"),
    [
        (100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996 in binary
        (100, 0.07, 7),
        (1000, 0.005, 5),
        (100, 0.299, 29),
        (3, 1 / 3, 1),
        (100, 1e-9, 1),
        (100, 1, 100),
        (100, 1.0, 100),
        (7, 0.5, 3),
        (100, np.float32(0.29), 29),
        (100, Fraction(1, 3), 33),
    ],
)
def test_density_is_rounded_down_from_the_decimal_as_written(n, density, k):
    assert ff.top_k_mask({"w": torch.rand(n)}, density=density).num_selected == k


@pytest.mark.parametrize("k", [np.int64(3), torch.tensor(3)], ids=["numpy", "torch"])
def test_k_may_be_any_integer_type(k):
    assert ff.top_k_mask({"w": torch.rand(9)}, k=k).num_selected == 3


@pytest.mark.parametrize(("n", "k"), [(30, 10), (7, 3), (1_000_003, 333_333), (100, 29)])
def test_the_density_of_k_weights_selects_k_weights(n, k):
    scores = {"w": torch.rand(n)}
    mask = ff.top_k_mask(scores, k=k)
    assert ff.top_k_mask(scores, density=mask.density) == mask
    assert ff.top_k_mask(scores, density=k / n) == mask


# ---- scope="layer" -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_scope_gives_every_tensor_its_share(backend):
    scores = {"a": torch.rand(100) + 10, "b": torch.rand(300), "c": torch.rand(0)}
    mask = ff.top_k_mask(scores, density=0.1, scope="layer", backend=backend)
    for name, k in (("a", 10), ("b", 30)):
        alone = {name: scores[name]}
        assert mask[name].tolist() == oracle.top_k(alone, k)[name].tolist()
    assert mask["c"].tolist() == []


def test_layer_scope_rounds_shares_to_the_nearest():
    sizes = {"a": 10, "b": 25, "c": 65}  # of 11: 1.1, 2.75, 7.15
    mask = ff.top_k_mask({name: torch.rand(n) for name, n in sizes.items()}, k=11, scope="layer")
    assert [len(found) for found in mask.values()] == [1, 3, 7]


@pytest.mark.parametrize("sizes", [[1, 1, 1], [6, 6, 2], [0, 5, 90, 3, 0, 12], [43, 1, 2, 3, 4]])
def test_layer_shares_are_the_highest_claims(sizes):
    """By 6, 6 and 2, largest remainders give 10 and 11 the shares 4, 4, 2 and 5, 5, 1."""
    claims = sorted((Fraction(-n, 2 * s + 1), i) for i, n in enumerate(sizes) for s in range(n))
    scores = {f"t{i}": torch.rand(n) for i, n in enumerate(sizes)}
    for k in range(1, sum(sizes) + 1):
        mask = ff.top_k_mask(scores, k=k, scope="layer", backend="torch")
        met = [i for _, i in claims[:k]]
        assert [len(found) for found in mask.values()] == [met.count(i) for i in range(len(sizes))]


def test_layer_scope_shares_what_keep_leaves():
    scores = {
        "head": torch.zeros(10),
        "a": torch.rand(50),
        "b": torch.rand(50),
        "out": few_values(90),
    }
    mask = ff.top_k_mask(scores, k=20, scope="layer", keep=["head"], exclude=["out"])
    assert {name: len(found) for name, found in mask.items()} == {
        "head": 10, "a": 5, "b": 5, "out": 0,
    }  # fmt: skip


@pytest.mark.parametrize("k", [1, 7, 33, 63, 64])
def test_layer_scope_selects_exactly_k(k):
    scores = {f"t{n}": torch.zeros(n) for n in (1, 2, 3, 4, 5, 6, 43)}
    mask = ff.top_k_mask(scores, k=k, scope="layer")
    assert mask.num_selected == k
    assert mask.num_zero_score == k


# ---- keep and exclude ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        pytest.param(["fc"], ["fc.weight", "fc.bias"], id="module-not-substring"),
        pytest.param("fc", ["fc.weight", "fc.bias"], id="a-string-for-a-list"),
        pytest.param(["fc.bias"], ["fc.bias"], id="parameter"),
        pytest.param(["mlp"], ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc"], id="outer-module"),
        pytest.param(["mlp.fc"], ["mlp.fc"], id="parameter-not-prefix"),
        pytest.param(["head"], ["head"], id="top-level-parameter"),
        pytest.param(["*.bias"], ["fc.bias", "mlp.fc1.bias"], id="glob"),
        pytest.param(["*fc?.w*"], ["mlp.fc1.weight"], id="question-mark"),
        pytest.param(["mlp.fc[0-9].bias"], ["mlp.fc1.bias"], id="set"),
        pytest.param(["head", "fc", "fc.bias"], ["fc.weight", "fc.bias", "head"], id="several"),
        pytest.param((n for n in ["head"]), ["head"], id="a-generator"),
    ],
)
def test_keep_entries(keep, kept):
    k = 4 * len(kept)
    mask = ff.top_k_mask(model_scores(), k=k, keep=keep)
    assert [name for name, found in mask.items() if found.tolist() == [0, 1, 2, 3]] == kept
    assert mask.num_selected == k


def test_a_name_with_brackets_is_a_name_first():
    mask = ff.top_k_mask({"a[0]": torch.rand(2), "a0": torch.rand(2)}, k=2, keep="a[0]")
    assert {name: len(found) for name, found in mask.items()} == {"a[0]": 2, "a0": 0}


def test_the_kept_part_is_charged_to_k_and_the_rest_competes():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "head": torch.zeros(2), "b": torch.tensor([4.5])}
    mask = ff.top_k_mask(scores, k=4, keep=["head"])
    assert {n: f.tolist() for n, f in mask.items()} == {"a": [0], "head": [0, 1], "b": [0]}
    assert mask.num_zero_score == 2


def test_excluded_weights_are_never_selected_and_count_in_n():
    scores = {"a": torch.rand(60), "embedding": torch.rand(40) + 5}
    mask = ff.top_k_mask(scores, density=0.5, exclude="embedding")
    assert {name: len(found) for name, found in mask.items()} == {"a": 50, "embedding": 0}
    assert mask.num_params == 100


def test_everything_may_be_kept():
    mask = ff.top_k_mask(model_scores(), density=1.0, keep=["*"])
    assert mask.num_selected == mask.num_params == 24
