"""`scores_device`: scores that live elsewhere than the parameters, with the same bits."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import BATCH, score
from models import CASES, classify
from torch import nn

import fishfast as ff
from fishfast.fisher.engine import score_memory, staged_scores
from fishfast.fisher.engine.staged_scores import StagedScores


@pytest.fixture
def staged(monkeypatch):
    """Has scores of parameters on the CPU go to and from the CPU, as if it were another device."""
    monkeypatch.setattr(score_memory, "_is_elsewhere", lambda *_: True)
    monkeypatch.setattr(staged_scores, "_HELD", 0)
    made = []
    make = StagedScores.__init__

    def noted(self, *args):
        made.append(self)
        make(self, *args)

    monkeypatch.setattr(StagedScores, "__init__", noted)
    return made


KINDS = [
    "mlp", "tied_language_model", "embedding", "convnet_with_norms", "conv_weight_channels_last",
    "weight_norm", "lstm", "experts_in_a_loop", "experts_grouped", "other_layers", "called_twice",
    "custom_function", "low_rank_updates", "bare_parameters", "checkpointed",
]  # fmt: skip


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind, power, request):
    case = CASES[kind]()
    expected = score(case, power=power)
    (made := request.getfixturevalue("staged")).clear()
    fisher = score(case, power=power, scores_device="cpu")
    assert len(made) == 1
    assert fisher.roads == expected.roads
    for name, values in expected.items():
        assert torch.equal(fisher[name], values), name
        assert fisher[name].is_contiguous()
    assert sum(bool(values.any()) for values in expected.values()) > 1


@pytest.mark.parametrize("fisher_type", ["exact", "sampled"])
def test_several_backwards_of_a_batch(fisher_type, request):
    def outputs_fn(model, batch):
        return model(batch[0])

    options = {"fisher_type": fisher_type, "outputs_fn": outputs_fn}
    model = CASES["mlp"]().model
    expected = ff.estimate_fisher(model, [BATCH, BATCH], **options)
    request.getfixturevalue("staged")
    fisher = ff.estimate_fisher(model, [BATCH, BATCH], scores_device="cpu", **options)
    assert all(torch.equal(fisher[name], expected[name]) for name in expected)


def test_a_run_that_stops_goes_on(staged, tmp_path):
    case = CASES["mlp"]()
    expected = score(case)
    staged.clear()
    path = tmp_path / "running.safetensors"
    options = {"resume_path": path, "save_every": 0.0, "scores_device": "cpu"}
    ff.estimate_fisher(case.model, case.batches[:1], loss_fn=case.loss_fn, **options)
    fisher = score(case, **options)
    assert all(torch.equal(fisher[name], expected[name]) for name in expected)
    assert len(staged) == 2


@pytest.mark.parametrize(
    ("scale", "text"), [(1e25, "above 1.8e19"), (torch.nan, "must return finite losses")]
)
def test_scores_that_are_not_finite_are_refused(staged, scale, text):
    with pytest.raises(ValueError, match=text):
        ff.estimate_fisher(
            nn.Linear(6, 4), [BATCH], loss_fn=lambda m, b: classify(m, b) * scale,
            scores_device="cpu",
        )  # fmt: skip


def test_scores_of_which_only_the_sum_overflows_are_kept(staged):
    """Elements of 2e38 are finite in fp32, their sum is not."""
    model = nn.Linear(2, 2, bias=False)
    fisher = ff.estimate_fisher(
        model, [torch.full((1, 2), 1.4e19)], loss_fn=lambda m, x: m(x).sum(1), scores_device="cpu"
    )
    assert torch.equal(fisher["weight"], torch.full((2, 2), 1.4e19).square())


def test_few_scores_are_held_at_once():
    """The least recently used ones go back first, and only when they are asked to."""
    kept = {name: torch.zeros(4) for name in "abc"}
    kept["d"] = torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)
    scores = StagedScores(kept, dict.fromkeys(kept, torch.device("cpu")), 40)
    for name in "abac":
        scores[name].add_(1)
    assert not any(values.any() for values in kept.values())
    scores.trim()
    assert [float(values.sum()) for values in kept.values()] == [0, 4, 0, 0]
    assert scores["d"].stride() == kept["d"].stride()
    scores["d"][0, 1, 0, 1] = torch.inf
    assert not scores.settle()
    assert kept["a"].sum() == 8
    assert kept["c"].sum() == 4
    assert kept["d"][0, 1, 0, 1] == torch.inf
    assert list(scores) == list("abcd")
    assert len(scores) == 4


def test_the_device_of_the_parameters_is_the_default():
    model = nn.Linear(6, 4)
    fisher = ff.estimate_fisher(model, [BATCH], loss_fn=classify, scores_device="cpu")
    expected = ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    assert all(torch.equal(fisher[name], expected[name]) for name in expected)
    assert "scores: 112 bytes of fp32 on cpu" in expected.report()


@pytest.mark.parametrize(
    ("device", "error", "text"),
    [
        ("meta", ValueError, "scores_device must be a device that holds values.*got 'meta'"),
        ("disk", ValueError, "scores_device must be a device .*got 'disk'"),
        (3.5, TypeError, "scores_device must be a device .*got 3.5"),
        pytest.param(
            "cuda:99", ValueError, "scores_device must be a device that is here.*got 'cuda:99'",
        ),
    ],
)  # fmt: skip
def test_other_devices_are_refused(device, error, text):
    with pytest.raises(error, match=text):
        ff.estimate_fisher(nn.Linear(6, 4), [BATCH], loss_fn=classify, scores_device=device)
