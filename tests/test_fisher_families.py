"""`estimate_fisher` on whole models of many families: scores, masks, and what is batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fisher_checks import truth
from models import DENSE, FAMILIES, huggingface
from torch import nn

import fishfast as ff

RAN = set()


def assert_same_top_k(found, exact, density):
    """The masks of both are the same up to weights whose scores tie at the threshold.

    fp32 cannot order what differs by less than its rounding. Such weights are those that both
    scores put there: within 1e-5 of the threshold, 80 units in the last place of a score.
    """
    found, exact = (np.concatenate([np.ravel(v) for v in s.values()]) for s in (found, exact))
    k = max(1, round(density * len(exact)))
    chosen, expected = (set(np.argsort(-s, kind="stable")[:k].tolist()) for s in (found, exact))
    threshold = np.sort(exact)[-k]
    for index in chosen ^ expected:
        assert exact[index] == pytest.approx(threshold, rel=1e-5), f"weight {index}"


@pytest.mark.parametrize("kind", FAMILIES)
def test_whole_models(kind):
    """Without a loss_fn, each sample's loss is what the model says when it gets it alone."""
    case = huggingface(kind)
    fisher = ff.estimate_fisher(case.model, case.batches)
    assert fisher.num_samples == 7
    exact = truth(case)
    found = {name: score.double().numpy() for name, score in fisher.items()}
    error = np.sqrt(sum(np.square(found[name] - exact[name]).sum() for name in exact))
    norm = np.sqrt(sum(np.square(values).sum() for values in exact.values()))
    assert error < 1e-5 * norm  # the aim is 1e-4
    for density in (0.005, 0.05):
        assert_same_top_k(found, exact, density)

    assert set(fisher.fallback) == case.fallback
    assert bool(fisher.passes["fallback"]) == bool(case.fallback)
    if kind in DENSE:  # one backward for each batch; rows are looked at in the first one only
        assert fisher.passes["backward"] == 2
        first = ff.estimate_fisher(case.model, case.batches[:1])
        assert fisher.passes["probe"] == first.passes["probe"]
    unused = {name for name, values in exact.items() if not values.any()}
    assert {name for name, road in fisher.roads.items() if road == "not used"} <= unused
    RAN.add(kind)


def test_nothing_dense_needs_the_fallback():
    assert not any(family.fallback for family in DENSE.values())


def test_at_least_sixteen_families_ran(request):
    chosen = {item.name for item in request.session.items}
    if not {f"test_whole_models[{kind}]" for kind in FAMILIES} <= chosen:
        pytest.skip("a part of the families was chosen by hand")
    assert set(FAMILIES) == RAN
    assert len({kind.partition("_")[0] for kind in RAN}) >= 16


def test_a_report_of_a_dense_model_says_that_all_is_batched():
    case = huggingface("gpt2")
    report = ff.estimate_fisher(case.model, case.batches).report()
    assert "one sample at a time" not in report
    assert "fallback" not in report


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_changes_nothing(kind, use_reentrant):
    """The library checkpoints in train mode only: the layers keep that flag on themselves."""
    case = huggingface(kind)
    expected = ff.estimate_fisher(case.model, case.batches)
    case.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    case.model.eval()
    layers = [m for m in case.model.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    runs = []
    first = next(m for m in layers[-1].modules() if isinstance(m, nn.Linear))
    first.register_forward_hook(lambda *_: runs.append(1))

    fisher = ff.estimate_fisher(case.model, case.batches, eval_mode=False)
    assert len(runs) > fisher.passes["forward"]  # the others in a backward
    assert not fisher.fallback
    for name, values in expected.items():
        torch.testing.assert_close(fisher[name], values, rtol=1e-5, atol=0)
