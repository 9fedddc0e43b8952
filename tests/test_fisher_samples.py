"""How samples come in batches does not matter to `estimate_fisher`, nor how many at once."""

from __future__ import annotations

import models
import pytest
import torch
from fisher_checks import BATCH, assert_as_exact_as_a_loop, samples_of, score, truth
from models import CASES, classify, per_sample
from torch import nn

import fishfast as ff


@pytest.mark.parametrize(
    "name",
    [
        "convnet_with_norms", "embedding", "transformer_layer", "positions", "class_tokens_expand",
        "time_first", "tied_with_padding", "called_twice", "routed_samples", "experts_grouped",
        "packed_sequences", "recurrent_time_first", "low_rank_updates",
    ],
)  # fmt: skip
def test_batch_sizes_do_not_matter(name):
    case = CASES[name]()
    exact, plain = truth(case), truth(case, torch.float32)
    singles = [one for batch in case.batches for one in samples_of(case, batch)]
    case.batches = singles
    fisher = score(case)
    assert fisher.num_samples == len(singles)
    assert_as_exact_as_a_loop(fisher, exact, plain)
    assert not set(fisher.fallback) - case.fallback


@pytest.mark.parametrize(
    "name",
    [
        "convnet_with_norms", "embedding", "lstm", "tied_language_model", "called_twice",
        "flattened_time_first", "experts_in_a_loop", "positions", "recurrent_time_first",
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_samples", [1, 2, 3, 5])
def test_num_samples_cuts_in_the_middle_of_a_batch(name, num_samples):
    case = CASES[name]()
    fisher = score(case, num_samples=num_samples)
    assert fisher.num_samples == num_samples
    assert_as_exact_as_a_loop(
        fisher, truth(case, limit=num_samples), truth(case, torch.float32, limit=num_samples)
    )


def test_num_samples_takes_no_batch_too_many():
    taken = []

    def batches():
        for i in range(10):
            taken.append(i)
            yield BATCH

    ff.estimate_fisher(nn.Linear(6, 4), batches(), loss_fn=classify, num_samples=8)
    assert taken == [0, 1]


def test_fewer_samples_than_asked_for_is_said():
    with pytest.warns(UserWarning, match="num_samples=9, but batches gave only 4 samples") as seen:
        fisher = ff.estimate_fisher(nn.Linear(6, 4), [BATCH], loss_fn=classify, num_samples=9)
    assert fisher.num_samples == 4
    assert seen[0].filename == __file__


def test_samples_go_through_in_chunks_without_a_trace():
    """Per-sample gradients of 2**21 elements and more are made a few samples at a time."""
    model = nn.Conv2d(64, 200, 3, padding=1, bias=False)
    case = models.Case(model, [torch.randn(40, 64, 3, 3)], per_sample, set())
    case.batches[0][:38] = 0  # only the last two samples count
    assert 2 * model.weight[0].numel() * 200 * 10 > 2**21
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


@pytest.mark.parametrize(
    "name",
    [
        "convnet_with_norms", "embedding", "transformer_layer", "tied_language_model",
        "experts_in_a_loop", "packed_sequences", "lstm", "recurrent_time_first",
    ],
)  # fmt: skip
def test_the_same_bits_twice(name):
    case = CASES[name]()
    first, second = score(case), score(case)
    assert all(torch.equal(first[name], second[name]) for name in first)
