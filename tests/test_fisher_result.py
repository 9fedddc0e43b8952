"""Which parameters are scored, and what the result says of each."""

from __future__ import annotations

import collections
import copy
import pickle

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
    case = CASES["other_layers"]()
    fisher = score(case)
    assert isinstance(fisher, collections.abc.Mapping)
    assert len(fisher) == len(list(case.model.parameters()))
    report = fisher.report()
    for name in fisher:
        (line,) = [line for line in report.splitlines() if line.split()[0] == name]
        assert ("batched" in line) == (name not in case.fallback)
        assert fisher.fallback.get(name, "batched") in line
    alone = len(case.fallback)
    assert alone
    assert repr(fisher).endswith(f"5 samples, {alone} tensors one sample at a time)")
    assert ff.top_k_mask(fisher, density=0.1).num_selected == int(
        0.1 * sum(map(torch.numel, fisher.values()))
    )


@pytest.mark.parametrize(
    ("name", "parameter", "reason"),
    [
        ("custom_function", "inner.weight", "used by scaled, which has no rule for it"),
        ("other_layers", "pair.weight", "reaches several rows of its call"),
    ],
)
def test_fallback_reasons(name, parameter, reason):
    assert reason in score(CASES[name]()).fallback[parameter]


# ---- what the result knows, and sums of results --------------------------------------------------


def result(**changes):
    """Three tensors, one of them by the fallback."""
    facts = {
        "scores": {
            "a.weight": torch.tensor([[1.0, 2.0], [3.0, 6.0]]),
            "a.bias": torch.zeros(2),
            "scale": torch.tensor(5.0),
        },
        "num_samples": 4,
        "fallback": {"scale": "used by exp"},
        "num_batches": 2,
        "fisher_type": "sampled",
        "power": 1,
        "roads": {"a.weight": "batched through a row map", "scale": "used by exp"},
        "passes": {"forward": 2, "backward": 6, "probe": 1, "fallback": 12},
        "seconds": {"forward": 1.0, "backward": 3.5, "probe": 0.5, "fallback": 5.0},
    }
    return ff.Fisher(**{**facts, **changes})


def assert_same_result(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name].cpu(), expected[name].cpu())
    assert found.facts() == expected.facts()


def test_scores_samples_and_fallback_alone_are_enough():
    fisher = ff.Fisher({"w": torch.ones(2), "b": torch.ones(1)}, 3, {"b": "why"})
    assert fisher.facts() == {
        "num_samples": 3, "num_batches": 0, "fisher_type": "empirical", "power": 2,
        "fallback": {"b": "why"}, "roads": {"w": "batched", "b": "why"},
        "passes": dict.fromkeys(["forward", "backward", "probe", "fallback"], 0),
        "seconds": dict.fromkeys(["forward", "backward", "probe", "fallback"], 0.0),
    }  # fmt: skip
    assert ff.Fisher({}, 1).fallback == {}


def test_report_of_a_result_says_what_each_road_cost():
    assert result().report().splitlines() == [
        "parameter    shape    mean score per sample    road",
        "-----------  -------  -----------------------  -------------------------",
        "a.weight     (2, 2)   0.75                     batched through a row map",
        "a.bias       (2,)     0                        batched",
        "scale        ()       1.25                     used by exp",
        "batched: 2 tensors, 2 forward, 6 backward, 1 probe passes, 5.0 s of 10.0 s (50%)",
        "fallback: 1 tensors, 12 extra backward passes, 5.0 s of 10.0 s (50%)",
        "scores: 28 bytes of fp32 on cpu",
    ]


def test_report_without_times_or_fallback_or_scores():
    report = ff.Fisher({"1e3": torch.ones(0)}, 2).report()
    assert report.splitlines()[2:] == [
        "1e3          (0,)     0                        batched",
        "batched: 1 tensors, 0 forward, 0 backward, 0 probe passes",
        "scores: 0 bytes of fp32 on cpu",
    ]
    assert ff.Fisher({}, 1).report().endswith("scores: none")


@pytest.mark.parametrize(
    ("size", "text"), [(250, "1.0 KB"), (2_650_000, "10.6 MB"), (10**9, "4.0 GB")]
)
def test_report_says_how_large_the_scores_are(size, text):
    scores = {"a": torch.zeros(()).expand(size), "b": torch.zeros(7, device="meta")}
    last = ff.Fisher({"a": scores["a"]}, 1)._memory()
    assert last == f"scores: {text} of fp32 on cpu"
    both = ff.Fisher(scores, 1)._memory()
    assert both == f"{last}, 28 bytes of fp32 on meta"


def test_repr_of_a_result():
    assert repr(result()) == (
        "Fisher(sampled, absolute values, 7 weights in 3 tensors, 4 samples, "
        "1 tensors one sample at a time)"
    )


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_know_the_same(clone):
    assert_same_result(clone(result()), result())


def test_to_moves_the_scores_and_keeps_the_rest():
    assert result().to("meta")["scale"].device.type == "meta"
    assert_same_result(result().to("cpu"), result())


def test_sums_are_of_all_samples():
    other = result(
        scores=dict(reversed([(name, 2 * score) for name, score in result().items()])),
        num_samples=3,
        fallback={"a.bias": "used by log", "scale": "used by exp"},
        roads={"a.weight": "batched"},
    )
    first = result()
    total = first + other
    assert list(total) == list(first)  # the order decides ties
    assert all(torch.equal(total[name], 3 * first[name]) for name in first)
    assert_same_result(first, result())
    assert total.facts() == {
        "num_samples": 7, "num_batches": 4, "fisher_type": "sampled", "power": 1,
        "fallback": {"scale": "used by exp", "a.bias": "used by log"},
        "roads": {"a.weight": "batched through a row map / batched",
                  "a.bias": "batched / used by log", "scale": "used by exp"},
        "passes": {"forward": 4, "backward": 12, "probe": 2, "fallback": 24},
        "seconds": {"forward": 2.0, "backward": 7.0, "probe": 1.0, "fallback": 10.0},
    }  # fmt: skip
    assert (total + other).roads == total.roads


def test_sums_over_calls_equal_one_call():
    case = CASES["transformer_layer"]()
    whole = score(case)
    parts = [
        ff.estimate_fisher(case.model, [batch], loss_fn=case.loss_fn) for batch in case.batches
    ]
    total = sum(parts[1:], start=parts[0])
    assert total.num_samples == whole.num_samples
    for name in whole:
        torch.testing.assert_close(total[name], whole[name])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"power": 2}, "power is 1 here and 2 there"),
        ({"fisher_type": "exact"}, "fisher_type is 'sampled' here and 'exact' there"),
        ({"scores": {"scale": torch.ones(())}, "roads": {}}, "'a.weight' is scored here only"),
        ({"scores": {**result(), "b": torch.ones(1)}}, "'b' is scored there only"),
        ({"scores": {**result(), "scale": torch.ones(1)}},
         r"'scale' has shape \(\) here and \(1,\) there"),
    ],
)  # fmt: skip
def test_sums_of_different_things_are_refused(changes, text):
    with pytest.raises(ValueError, match=f"of the same parameters and kind; {text}"):
        result() + result(**changes)


def test_only_results_are_added():
    with pytest.raises(TypeError, match="unsupported operand"):
        result() + {"scale": torch.ones(())}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fisher_type": "true"}, "fisher_type must be one of 'empirical', .*; got 'true'"),
        ({"power": 3}, r"power must be 2 \(squares\) or 1 \(absolute values\); got 3"),
        ({"num_samples": -1}, "num_samples must be a whole number >= 0; got -1"),
        ({"num_batches": 1.5}, "num_batches must be a whole number >= 0; got 1.5"),
        ({"roads": {"none": "batched"}}, "must name parameters of scores; got 'none'"),
        ({"fallback": {"none": "why"}}, "must name parameters of scores; got 'none'"),
        ({"passes": {"forwards": 1}}, "must be of 'forward', .*; got 'forwards'"),
    ],
)  # fmt: skip
def test_facts_that_cannot_be_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        result(**changes)
