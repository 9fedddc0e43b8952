"""The Fisher on a card: the Triton kernels under whole models, autocast, several devices."""

from __future__ import annotations

import copy

import pytest
import torch
from fisher_checks import score, truth
from models import CASES, HUGGINGFACE, huggingface
from torch import nn
from torch.utils._pytree import tree_map

import fishfast as ff
from fishfast.fisher.engine import staged_scores

pytestmark = pytest.mark.gpu

_KINDS = [*CASES, *HUGGINGFACE]


def _case(kind):
    return CASES[kind]() if kind in CASES else huggingface(kind)


def _on_card(value):
    return tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, torch.Tensor) else leaf, value)


def _relative_error(fisher, exact):
    error = sum(
        float((fisher[n].double().cpu() - torch.as_tensor(exact[n])).square().sum()) for n in exact
    )
    return (error / sum(float(torch.as_tensor(v).square().sum()) for v in exact.values())) ** 0.5


def test_the_kernels_run_and_not_a_fallback():
    assert ff.build_info()["operations"]["fisher"]["cuda"] == "triton"


@pytest.mark.parametrize("power", [2, 1], ids=["squares", "absolute"])
@pytest.mark.parametrize("kind", _KINDS)
def test_exact_per_sample(kind, power):
    case = _case(kind)
    exact = truth(case, power=power)
    case.model.cuda()
    case.batches = _on_card(case.batches)
    fisher = score(case, power=power)
    assert _relative_error(fisher, exact) < 1e-4
    assert not set(fisher.fallback) - case.fallback


@pytest.mark.parametrize("kind", ["linear_over_positions", "convnet_with_norms", "bert", "llama"])
def test_two_runs_give_the_same_bits(kind):
    case = _case(kind)
    case.model.cuda()
    case.batches = _on_card(case.batches)
    first, second = score(case), score(case)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_exact_as_a_loop_under_autocast(dtype):
    case = _case("bert")
    exact = truth(case)
    case.model.cuda()
    case.batches = _on_card(case.batches)
    own = case.loss_fn

    def loss_fn(model, batch):
        with torch.autocast("cuda", dtype=dtype):
            return own(model, batch).float()

    case.loss_fn = loss_fn
    found = score(case)
    plain = {name: torch.zeros_like(p) for name, p in case.model.named_parameters()}
    case.model.eval()
    for batch in case.batches:
        for loss in loss_fn(case.model, batch):
            grads = torch.autograd.grad(
                loss, list(case.model.parameters()), retain_graph=True,
                allow_unused=True,
            )  # fmt: skip
            for name, grad in zip(plain, grads, strict=True):
                if grad is not None:
                    plain[name] += grad.float().square()
    assert _relative_error(found, exact) <= 2 * _relative_error(plain, exact) + 1e-5


def test_a_model_on_two_devices():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4).cuda()
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x):
            return self.second((torch.tanh(self.first(x)) * self.scale).cuda())

    def losses(model, batch):
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1].to(logits.device), reduction="none")

    model = Split()
    batches = [(torch.randn(b, 6), torch.randint(0, 4, (b,))) for b in (5, 3)]
    fisher = ff.estimate_fisher(model, batches, loss_fn=losses)
    whole = copy.deepcopy(model).cpu()
    whole.second.cpu()
    whole.forward = lambda x: whole.second(torch.tanh(whole.first(x)) * whole.scale)
    expected = ff.estimate_fisher(whole, batches, loss_fn=losses)
    for name, parameter in model.named_parameters():
        assert fisher[name].device == parameter.device
        torch.testing.assert_close(fisher[name].cpu(), expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["mlp", "tied_language_model", "convnet_with_norms", "bert"])
def test_scores_that_live_on_the_host_have_the_same_bits(kind, monkeypatch):
    """Through buffers smaller than a weight, and with nothing left on the card between calls."""
    monkeypatch.setattr(staged_scores, "_CHUNK", 37)
    monkeypatch.setattr(staged_scores, "_HELD", 0)
    case = _case(kind)
    case.model.cuda()
    case.batches = _on_card(case.batches)
    expected, fisher = score(case), score(case, scores_device="cpu")
    for name, values in expected.items():
        assert fisher[name].device.type == "cpu"
        assert torch.equal(fisher[name], values.cpu()), name
