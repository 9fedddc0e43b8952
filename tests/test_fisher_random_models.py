"""`estimate_fisher` on whole models drawn at random, against a loop over single samples."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import assert_as_exact_as_a_loop, assert_same_state, score, state_of, truth
from random_models import draw_case


def assert_exact(seed):
    case = draw_case(seed)
    before = state_of(case.model)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32), rounding=1e-5)
    assert_same_state(before, state_of(case.model))


@pytest.mark.parametrize("seed", range(60))
def test_random_models(seed):
    assert_exact(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(60, 460))
def test_more_random_models(seed):
    assert_exact(seed)
