"""Magnitude, random and bias masks: the same budget rules, and a uniform choice."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import oracle
import pytest
import torch
from torch import nn

import fishfast as ff


def small_model():
    """Names body.weight [3, 4], body.bias [3], norm.weight, norm.bias [3], head.* (6 + 2)."""
    model = nn.Module()
    model.body, model.norm, model.head = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)
    return model


def flat(mask, names):
    """Indices of the named parameters as if they lay one behind the other."""
    start, found = 0, []
    for name in names:
        found += [start + int(i) for i in mask[name]]
        start += int(np.prod(mask.shapes[name]))
    return found


# ---- magnitude ----------------------------------------------------------------------------------


def test_magnitude_scores_are_absolute_values_of_trainable_weights():
    model = small_model()
    model.norm.requires_grad_(False)
    scores = ff.magnitude_scores(model)
    assert list(scores) == ["body.weight", "body.bias", "head.weight", "head.bias"]
    assert torch.equal(scores["body.weight"], model.body.weight.abs())
    assert not any(score.requires_grad for score in scores.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitude_mask(dtype):
    model = small_model().to(dtype)
    mask = ff.top_k_mask(ff.magnitude_scores(model), k=9)
    truth = oracle.top_k({name: p.detach().abs() for name, p in model.named_parameters()}, 9)
    assert {name: found.tolist() for name, found in mask.items()} == {
        name: found.tolist() for name, found in truth.items()
    }


def test_magnitude_scores_do_not_follow_the_model():
    model = small_model()
    scores = ff.magnitude_scores(model)
    before = scores["head.bias"].clone()
    with torch.no_grad():
        model.head.bias.add_(100)
    assert torch.equal(scores["head.bias"], before)


# ---- random -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 14, 15, 28, 29])
def test_random_mask_has_exactly_k_and_depends_on_the_seed_only(k):
    model = small_model()
    mask = ff.random_mask(model, k=k, seed=5)
    assert mask.num_selected == k
    assert mask.num_params == 29
    assert mask.num_zero_score is None
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global state must not matter
    assert ff.random_mask(small_model(), k=k, seed=5) == mask


def test_random_mask_leaves_the_global_generators_alone():
    model = small_model()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ff.random_mask(model, k=7, seed=5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_other_seeds_give_other_masks():
    assert len({ff.random_mask(small_model(), k=10, seed=seed) for seed in range(50)}) == 50


def test_this_seed_gives_this_mask():
    """A literal: the mask of a published seed must not change between versions."""
    mask = ff.random_mask(nn.Linear(10, 10), k=6, seed=1)
    assert {name: found.tolist() for name, found in mask.items()} == {
        "weight": [3, 34, 46, 60, 70, 95], "bias": [],
    }  # fmt: skip


@pytest.mark.parametrize("k", [2, 4], ids=["below-half", "above-half"])
def test_every_subset_is_equally_likely(k):
    """Chi-square over all subsets of 6 weights, and a bound that a fair choice passes 99.9 %."""
    model = nn.Linear(2, 2)  # 4 weights, 2 biases
    draws = 3000
    subsets = {subset: 0 for subset in combinations(range(6), k)}
    for seed in range(draws):
        subsets[tuple(flat(ff.random_mask(model, k=k, seed=seed), ["weight", "bias"]))] += 1
    assert len(subsets) == 15
    expected = draws / 15
    statistic = sum((count - expected) ** 2 / expected for count in subsets.values())
    assert statistic < 36.1  # 99.9 % quantile of chi-square with 14 degrees of freedom


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_every_place_is_equally_likely(density):
    """Counts in 100 equal stretches of three tensors; the bound is the 99.9 % quantile."""
    model = nn.Module()
    model.a, model.b = nn.Linear(100, 499, bias=False), nn.Linear(100, 501, device="meta")
    names = ["a.weight", "b.weight", "b.bias"]
    cells = np.zeros(100)
    draws = 20
    for seed in range(draws):
        mask = ff.random_mask(model, density=density, seed=seed)
        starts = np.cumsum([0] + [np.prod(mask.shapes[name]) for name in names])
        places = np.concatenate([mask[n].numpy() + s for n, s in zip(names, starts, strict=False)])
        cells += np.histogram(places, bins=100, range=(0, 100_501))[0]
    expected = draws * mask.num_selected / 100
    # A stretch's count has the binomial variance times (1 - density), without replacement.
    statistic = ((cells - expected) ** 2 / (expected * (1 - density))).sum()
    assert statistic < 148.2  # chi-square, 99 degrees of freedom


def test_random_mask_takes_memory_of_order_k():
    """A model of 2e9 weights on no device at all, 200,000 selected."""
    model = nn.ModuleList([nn.Linear(32_000, 31_250, bias=False, device="meta") for _ in range(2)])
    tracemalloc.start()
    mask = ff.random_mask(model, density=1e-4, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (mask.num_params, mask.num_selected) == (2_000_000_000, 200_000)
    assert peak < 100 * 200_000  # 100 bytes per selected weight, 0.01 per weight


def test_random_mask_past_2_to_the_31():
    model = nn.Linear(2**16, 2**16, bias=False, device="meta")
    mask = ff.random_mask(model, k=1000, seed=0)
    found = mask["weight"]
    assert found.dtype == torch.int64
    assert mask.num_params == 2**32
    assert int(found.max()) > 2**31


def test_random_mask_follows_keep_and_exclude():
    model = small_model()
    mask = ff.random_mask(model, k=20, seed=3, keep=["head"], exclude="norm")
    assert len(mask["head.weight"]) == 6
    assert len(mask["head.bias"]) == 2
    assert len(mask["norm.weight"]) == len(mask["norm.bias"]) == 0
    assert len(mask["body.weight"]) + len(mask["body.bias"]) == 12
    assert mask.num_params == 29


def test_random_mask_of_the_kept_part_alone():
    mask = ff.random_mask(small_model(), k=8, seed=3, keep=["head"])
    assert mask.num_selected == len(mask["head.weight"]) + len(mask["head.bias"]) == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"density": 1.5}, r"density must be in \(0, 1\]; got 1.5"),
        ({}, "give density or k, one of them"),
        ({"k": 3, "density": 0.1}, "give density or k, one of them"),
        ({"k": 30}, "k must be from 1 to the number of weights, 29; got 30"),
        ({"k": 7, "keep": ["head"]}, "got k=7 for 8 kept weights"),
        ({"k": 7, "keep": ["haed"]}, "keep entry 'haed' matches no parameter"),
        ({"k": 25, "exclude": ["head"]}, "not excluded, 21; got 25"),
    ],
    ids=str,
)
def test_random_mask_refuses_what_top_k_mask_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        ff.random_mask(small_model(), seed=0, **arguments)


def tied_model():
    """The head's weight is the embedding's, and goes by that name."""
    model = nn.Module()
    model.emb, model.body, model.head = nn.Embedding(3, 2), nn.Linear(2, 2), nn.Linear(2, 3)
    model.head.weight = model.emb.weight
    return model


@pytest.mark.parametrize("entry", ["head", "head.weight", "emb", "head.*"])
def test_a_tied_weight_goes_by_any_of_its_names(entry):
    for mask in (
        ff.random_mask(tied_model(), k=10, seed=0, keep=entry),
        ff.bias_mask(tied_model(), keep=entry),
    ):
        assert mask["emb.weight"].tolist() == list(range(6))
        assert "head.weight" not in mask
    mask = ff.random_mask(tied_model(), k=4, seed=0, exclude=[entry])
    assert len(mask["emb.weight"]) == 0


@pytest.mark.parametrize(
    ("seed", "error", "text"),
    [
        (None, TypeError, "seed must be an integer; got None"),
        ("a", TypeError, "seed must be an integer; got 'a'"),
        (True, TypeError, "seed must be an integer; got True"),
        (-1, ValueError, "seed must be at least 0; got -1"),
    ],
)
def test_seeds_that_are_none_are_refused(seed, error, text):
    with pytest.raises(error, match=text):
        ff.random_mask(small_model(), k=3, seed=seed)


# ---- bias ---------------------------------------------------------------------------------------


def selected_names(mask):
    """Names that are selected whole; no parameter may be selected in part."""
    for name, found in mask.items():
        assert found.tolist() in ([], list(range(int(np.prod(mask.shapes[name])))))
    return [name for name, found in mask.items() if len(found)]


def test_bias_mask_selects_every_bias():
    mask = ff.bias_mask(small_model())
    assert selected_names(mask) == ["body.bias", "norm.bias", "head.bias"]
    assert (mask.num_selected, mask.num_params) == (8, 29)


def test_bias_mask_knows_the_names_of_torch():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    model.lstm = nn.LSTM(4, 4, bidirectional=True)
    model.biased_scale = nn.Parameter(torch.ones(3))
    model.relative_attention_bias = nn.Embedding(4, 2)  # its parameter is a weight
    assert selected_names(ff.bias_mask(model)) == [
        "attention.in_proj_bias", "attention.bias_k", "attention.bias_v", "attention.out_proj.bias",
        "lstm.bias_ih_l0", "lstm.bias_hh_l0", "lstm.bias_ih_l0_reverse", "lstm.bias_hh_l0_reverse",
    ]  # fmt: skip


def test_bias_mask_with_keep_and_exclude():
    mask = ff.bias_mask(small_model(), keep=["head"], exclude=["norm"])
    assert selected_names(mask) == ["body.bias", "head.weight", "head.bias"]


def test_bias_mask_when_every_bias_is_kept_already():
    assert selected_names(ff.bias_mask(nn.Linear(2, 2), keep="bias")) == ["bias"]


@pytest.mark.parametrize(
    ("model", "rules"),
    [
        pytest.param(nn.Linear(2, 2, bias=False), {}, id="no-bias"),
        pytest.param(nn.Linear(2, 2), {"exclude": ["bias"]}, id="excluded"),
    ],
)
def test_bias_mask_refuses_a_model_without_a_bias(model, rules):
    with pytest.raises(ValueError, match="model must have a bias that is not excluded; got none"):
        ff.bias_mask(model, **rules)


every_maker = pytest.mark.parametrize(
    "make",
    [
        ff.magnitude_scores,
        ff.bias_mask,
        lambda model: ff.random_mask(model, k=1, seed=0),
    ],
    ids=["magnitude", "bias", "random"],
)


@every_maker
@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)],
    ids=["no-parameters", "frozen"],
)
def test_models_without_trainable_parameters_are_refused(make, model):
    with pytest.raises(ValueError, match="must have parameters with requires_grad=True"):
        make(model)


@every_maker
def test_what_is_no_module_is_refused(make):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got dict"):
        make(dict(small_model().named_parameters()))


# ---- rules --------------------------------------------------------------------------------------


def every_kind(model, **rules):
    """A mask of each kind by the same rules."""
    fisher = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    return {
        "fisher": ff.top_k_mask(fisher, **rules),
        "layers": ff.top_k_mask(fisher, **rules, scope="layer"),
        "magnitude": ff.top_k_mask(ff.magnitude_scores(model), **rules),
        "random": ff.random_mask(model, **rules, seed=1),
        "split": ff.split_mask(fisher, **rules, num_workers=2)[1],
    }


def test_keep_exclude_and_density_mean_the_same_to_every_kind():
    rules = {"keep": ["head"], "exclude": ["norm.*", "body.bias"]}
    masks = every_kind(small_model(), density=0.45, **rules)  # 13 of 29, excluded ones included
    masks["bias"] = ff.bias_mask(small_model(), **rules)
    for kind, mask in masks.items():
        assert mask.num_params == 29, kind
        assert len(mask["head.weight"]) == 6, kind
        assert len(mask["head.bias"]) == 2, kind
        outside = len(mask["norm.weight"]) + len(mask["norm.bias"]) + len(mask["body.bias"])
        assert outside == 0, kind
        assert mask.num_selected == (8 if kind == "bias" else 13), kind


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"k": 5, "keep": "head"}, "k must cover the kept part; got k=5 for 8 kept weights"),
        ({"k": 9, "keep": "haed"}, "keep entry 'haed' matches no parameter"),
        ({"k": 9, "exclude": "body.w"}, "exclude entry 'body.w' matches no parameter"),
        ({"k": 9, "keep": "head", "exclude": "*.bias"}, "must not overlap; both match 'head.bias'"),
        ({"k": 30}, "k must be from 1 to the number of weights, 29; got 30"),
    ],
)
def test_every_kind_refuses_the_same(rules, text):
    model = small_model()
    fisher = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    for make in (
        lambda: ff.top_k_mask(fisher, **rules),
        lambda: ff.random_mask(model, **rules, seed=1),
        lambda: ff.split_mask(fisher, **rules, num_workers=2),
    ):
        with pytest.raises(ValueError, match=text):
            make()
