"""`split_mask`: the best weights dealt out in turn, disjoint but for what every worker keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import VALUES
from topk_cases import BACKENDS

import fishfast as ff


def dealt_by_hand(scores, num_workers, each, kept=(), out=()):
    """Deal (tensor, index) pairs from a fully sorted pack, one card at a time."""
    pack = [
        (-float(value), tensor, index)
        for tensor, name in enumerate(scores)
        if name not in kept and name not in out
        for index, value in enumerate(scores[name].double().flatten().tolist())
    ]
    pack.sort(key=lambda card: card if card[0] else (0.0, *card[1:]))  # -0.0 is 0.0
    hands = [
        {name: list(range(scores[name].numel())) if name in kept else [] for name in scores}
        for _ in range(num_workers)
    ]
    names = list(scores)
    for rank, (_, tensor, index) in enumerate(pack[: num_workers * each]):
        hands[rank % num_workers][names[tensor]].append(index)
    return [{name: sorted(found) for name, found in hand.items()} for hand in hands]


def as_lists(mask):
    return {name: found.tolist() for name, found in mask.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
@pytest.mark.parametrize("make", VALUES)
def test_masks_are_those_dealt_by_hand(make, num_workers, backend):
    scores = {f"t{i}": make(n) for i, n in enumerate([31, 0, 500, 1, 97])}
    for each in (1, 5, 629 // num_workers):
        masks = ff.split_mask(scores, k=each, num_workers=num_workers, backend=backend)
        assert [as_lists(mask) for mask in masks] == dealt_by_hand(scores, num_workers, each)
        for mask in masks:
            picked = torch.cat([scores[name][found.long()] for name, found in mask.items()])
            assert mask.num_zero_score == int((picked == 0).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kept_part_is_in_every_mask_and_charged_to_each(backend):
    scores = {
        "a": torch.rand(60),
        "head": torch.zeros(4),
        "b": torch.rand(40),
        "out": torch.ones(9),
    }
    rules = {"keep": ["head"], "exclude": "out", "backend": backend}
    masks = ff.split_mask(scores, k=20, num_workers=3, **rules)
    assert [as_lists(m) for m in masks] == dealt_by_hand(scores, 3, 16, ["head"], ["out"])
    assert [mask.num_selected for mask in masks] == [20, 20, 20]
    assert [mask.num_zero_score for mask in masks] == [4, 4, 4]
    assert {mask.num_params for mask in masks} == {113}
    union = {name: sorted(i for m in masks for i in m[name].tolist()) for name in ("a", "b")}
    whole = ff.top_k_mask(scores, k=52, **rules)
    assert union == {name: whole[name].tolist() for name in union}


def test_density_is_that_of_each_mask():
    scores = {"a": torch.rand(1000)}
    assert [m.density for m in ff.split_mask(scores, density=0.02, num_workers=4)] == [0.02] * 4


def test_the_kept_part_alone():
    scores = {"a": torch.rand(5), "head": torch.tensor([0.0, 1.0])}
    masks = ff.split_mask(scores, k=2, num_workers=3, keep="head")
    assert [as_lists(mask) for mask in masks] == [{"a": [], "head": [0, 1]}] * 3
    assert [mask.num_zero_score for mask in masks] == [1, 1, 1]


def test_one_worker_gets_the_mask_of_top_k_mask():
    scores = {"a": torch.rand(50, 20).T, "b": torch.rand(30).bfloat16()}
    (mask,) = ff.split_mask(scores, k=99, num_workers=1)
    assert mask == ff.top_k_mask(scores, k=99)


def test_many_scores_and_threads_give_the_same_masks():
    scores = {"a": torch.randint(0, 50, (300_000,)).float(), "b": torch.rand(200_000)}
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(ff.split_mask(scores, density=0.1, num_workers=4))
    finally:
        torch.set_num_threads(before)
    assert (
        found[0] == found[1] == ff.split_mask(scores, density=0.1, num_workers=4, backend="torch")
    )
    # A stable sort of everything: its rank r goes to worker r mod 4.
    flat = torch.cat(list(scores.values())).numpy()
    order = np.argsort(-flat, kind="stable")[:200_000]
    for worker, mask in enumerate(found[0]):
        own = np.sort(order[worker::4])
        np.testing.assert_array_equal(own[own < 300_000], mask["a"].numpy())
        np.testing.assert_array_equal(own[own >= 300_000] - 300_000, mask["b"].numpy())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_workers": 0}, ValueError, "num_workers must be at least 1; got 0"),
        ({"num_workers": 2.0}, TypeError, "num_workers must be an integer; got 2.0"),
        ({"num_workers": True}, TypeError, "num_workers must be an integer; got True"),
        ({"num_workers": 4, "k": 4}, ValueError,
         r"num_workers x \(k - kept\) must not exceed .* 9; got 4 x \(4 - 1\); lower density"),
        ({"num_workers": 2, "k": 1, "keep": ["a"]}, ValueError, "k must cover the kept part"),
        ({"num_workers": 2, "density": 2, "k": None}, ValueError,
         r"density must be in \(0, 1\]; got 2"),
        ({"num_workers": 2, "k": 2, "backend": "gpu"}, ValueError, "backend must be 'auto' or one"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, error, text):
    scores = {"a": torch.rand(9), "head": torch.rand(1)}
    with pytest.raises(error, match=text):
        ff.split_mask(scores, **{"k": 2, "keep": ["head"], **arguments})


@pytest.mark.parametrize("rules", [{}, {"keep": "bad"}, {"exclude": "bad"}])
def test_bad_scores_are_refused_wherever_they_are(rules):
    scores = {"good": torch.rand(9), "bad": torch.tensor([1.0, -2.0])}
    with pytest.raises(ValueError, match="got -2.0 at flat index 1 of 'bad'"):
        ff.split_mask(scores, k=3, num_workers=2, **rules)
