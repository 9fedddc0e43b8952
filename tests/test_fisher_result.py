"""Which parameters are scored, and what the result says of each."""

from __future__ import annotations

import collections

import models
import pytest
import torch
from fisher_checks import score
from models import CASES
from torch import nn

import fishfast as ff


def test_untouched_parameters_score_zero_and_frozen_ones_are_not_scored():
    case = CASES["unused_branch"]()
    case.model.frozen = nn.Linear(3, 3).requires_grad_(False)
    fisher = score(case)
    assert list(fisher) == ["bare", "used.weight", "used.bias", "unused.weight", "unused.bias"]
    for name in ("bare", "unused.weight", "unused.bias"):
        assert fisher[name].count_nonzero() == 0
    assert fisher["used.weight"].count_nonzero() == 24


def test_padding_scores_zero_and_tokens_that_do_not_occur_too():
    fisher = score(CASES["embedding_padding_from_the_end"]())
    assert fisher["embedding.weight"][2].count_nonzero() == 0
    only_padding = score(CASES["embedding_of_padding_only"]())
    assert only_padding["embedding.weight"].count_nonzero() == 0


def test_scale_grad_by_freq_is_not_a_part_of_the_derivative():
    case = models.embedding()
    expected = score(case)
    case.model.embedding.scale_grad_by_freq = True
    fisher = score(case)
    assert all(torch.equal(fisher[name], expected[name]) for name in fisher)


def test_scores_are_a_mapping_for_top_k_mask_with_a_report():
    case = CASES["transformer_layer"]()
    fisher = score(case)
    assert isinstance(fisher, collections.abc.Mapping)
    assert len(fisher) == len(list(case.model.parameters()))
    report = fisher.report()
    for name in fisher:
        (line,) = [line for line in report.splitlines() if line.split()[0] == name]
        assert ("batched" in line) == (name not in case.fallback)
        assert fisher.fallback.get(name, "batched") in line
    assert repr(fisher).endswith("5 samples, 4 tensors one sample at a time)")
    assert ff.top_k_mask(fisher, density=0.1).num_selected == int(
        0.1 * sum(map(torch.numel, fisher.values()))
    )


@pytest.mark.parametrize(
    ("name", "parameter", "reason"),
    [
        ("called_twice", "shared.weight", "used 2 times in one forward"),
        ("bare_parameters", "scale", "used by mul, which has no rule for it"),
        ("custom_function", "inner.weight", "used by scaled, which has no rule for it"),
        ("flattened_tokens", "inner.bias", "dim 0 of its call has 15 rows for 3 losses"),
        ("positions_T_equals_B", "positions.weight", "reaches several rows of dim 0"),
    ],
)
def test_fallback_reasons(name, parameter, reason):
    assert reason in score(CASES[name]()).fallback[parameter]
