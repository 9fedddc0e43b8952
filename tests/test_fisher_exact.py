"""`estimate_fisher` against a loop over single samples in float64, for models of every kind."""

from __future__ import annotations

import copy

import models
import oracle
import pytest
import torch
import torch.nn.functional as F
from fisher_checks import (
    BATCH,
    assert_as_exact_as_a_loop,
    assert_roads,
    assert_same_state,
    samples_of,
    score,
    state_of,
    truth,
)
from models import CASES, classify
from torch import nn

import fishfast as ff
from fishfast.fisher.engine.scorer import THROUGH


def test_a_fisher_worked_out_by_hand():
    """With loss_b = (w x_b)^2 / 2 the gradient is w x_b^2; the batch's own gradient is not used."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    batch = torch.tensor([[1.0], [-2.0], [3.0]])

    def loss_fn(model, x):
        return model(x).square().squeeze(1) / 2

    assert ff.estimate_fisher(model, [batch], loss_fn=loss_fn)["weight"].item() == 4 + 64 + 324
    fisher = ff.estimate_fisher(model, [batch], loss_fn=loss_fn, power=1)
    assert fisher["weight"].item() == 2 + 8 + 18


@pytest.mark.parametrize("power", [2, 1], ids=["squares", "absolute"])
@pytest.mark.parametrize("name", CASES)
def test_exact_per_sample(name, power):
    case = CASES[name]()
    fisher = score(case, power=power)
    assert_as_exact_as_a_loop(
        fisher, truth(case, power=power), truth(case, torch.float32, power=power), power
    )
    assert_roads(fisher, case)
    assert fisher.num_samples == sum(len(samples_of(case, batch)) for batch in case.batches)


@pytest.mark.parametrize(
    ("name", "parameter", "reason"),
    [
        ("custom_function", "inner.weight", "used by scaled, which has no rule for it"),
        ("custom_function", "inner.bias", "used by addmm, which has no rule for it"),
        ("other_layers", "act.weight", "the gradient of one loss reaches several rows of its call"),
    ],
)
def test_the_report_says_why_something_is_not_batched(name, parameter, reason):
    fisher = score(CASES[name]())
    assert fisher.fallback[parameter] == reason
    assert reason in fisher.report()


LOW_PRECISION = [
    "mlp", "embedding", "tied_with_padding", "called_twice", "convnet_with_norms",
    "conv_everything", "conv1d", "layer_norms", "rms_norms", "group_norms", "rms_norms_as_products",
    "bare_parameters", "layer_scales", "flattened_time_first", "transformer_layer",
    "class_tokens_expand", "lstm", "experts_in_a_loop", "experts_grouped", "other_layers",
]  # fmt: skip


@pytest.mark.parametrize("name", LOW_PRECISION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_have_fp32_scores(name, dtype):
    case = CASES[name]()
    exact, plain = truth(case), truth(case, dtype)
    case.model.to(dtype)
    case.batches = [oracle.in_dtype(batch, dtype) for batch in case.batches]
    # Half precision: one unit in a gradient, squared, on top of twice the loop's error.
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-6}[dtype]
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, exact, plain, rounding=rounding)
    assert set(fisher.fallback) == case.fallback


AUTOCAST = [
    "mlp", "convnet_with_norms", "layer_norms", "embedding", "transformer_layer",
    "tied_language_model", "called_twice", "conv1d", "group_norms", "rms_norms_as_products",
    "matrix_products", "checkpointed", "flattened_tokens", "experts_in_a_loop", "weight_norm",
    "transposed_convolutions",
]  # fmt: skip


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("where", ["in-loss_fn", "around-the-call"])
def test_autocast(name, where):
    case = CASES[name]()
    exact = truth(case)

    def in_bf16(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss_fn(model, batch).float()

    plain = oracle.fisher_by_backwards(case.model, case.batches, in_bf16)
    if where == "in-loss_fn":
        fisher = ff.estimate_fisher(case.model, case.batches, loss_fn=in_bf16)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            fisher = score(case)
            assert torch.is_autocast_enabled("cpu")
    assert set(fisher.fallback) == case.fallback
    assert_as_exact_as_a_loop(fisher, exact, plain, rounding=2**-7)


# ---- what could go wrong silently ---------------------------------------------------------------


def test_time_first_batches_with_more_samples_than_steps_are_not_taken_for_tokens():
    """Tokens [T=2, B=4] have four losses for two rows; that is right."""
    model = nn.Linear(6, 4)
    batch = torch.randn(2, 4, 6)

    def loss_fn(model, x):
        return model(x).square().mean((0, 2))

    fisher = ff.estimate_fisher(model, [batch], loss_fn=loss_fn)
    singles = [batch[:, b : b + 1] for b in range(4)]
    exact = oracle.fisher_by_loop(model, singles, loss_fn, only_first)
    plain = oracle.fisher_by_loop(model, singles, loss_fn, only_first, dtype=torch.float32)
    assert_as_exact_as_a_loop(fisher, exact, plain)


def only_first(batch, b):
    return batch if b == 0 else None


def test_a_gradient_penalty_is_exact():
    """A gradient through the intercepted calls' backward, whose second derivative no rule has."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))

    def penalty(model, batch):
        x = batch[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return grad.square().sum(1)

    case = models.Case(model, [BATCH], penalty, set())
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert set(fisher.fallback) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert "takes gradients itself" in fisher.fallback["0.weight"]


def test_compiled_models_are_scored_exactly():
    case = models.mlp()
    expected = score(case)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="aot_eager")
    compiled(case.batches[0][0])  # its graph must not be used for the scores
    before = state_of(case.model)
    fisher = ff.estimate_fisher(compiled, case.batches, loss_fn=classify)
    for name, values in expected.items():
        torch.testing.assert_close(fisher[name], values)
    assert not fisher.fallback
    assert_same_state(before, state_of(case.model))
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch._dynamo.reset()


def test_a_bias_that_is_broadcast_is_exact():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(1))

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    case = models.Case(Broadcast(), [BATCH], classify, set())
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))


def test_a_layout_that_changes_between_batches_is_exact():
    """Batches of one hide that dim 0 is time; the next batch shows it."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))

    batches = [(torch.randn(b, 3, 6), torch.randint(0, 4, (b,))) for b in (1, 3, 2)]
    case = models.Case(Turned(), batches, classify, set())
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert not fisher.fallback


def test_copies_of_a_model_agree_bit_for_bit():
    case = models.convnet_with_norms()
    twin = copy.deepcopy(case.model)
    first = score(case)
    second = ff.estimate_fisher(twin, case.batches, loss_fn=case.loss_fn)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["weight_norm", "lstm", "tables", "linear_over_positions", "bert"])
def test_the_report_names_weights_that_cost_a_backward_per_sample(kind):
    case = CASES[kind]() if kind in CASES else models.huggingface(kind)
    through = {name for name, road in score(case).roads.items() if road.endswith(THROUGH)}
    expected = {
        "weight_norm": {f"0.parametrizations.weight.original{i}" for i in (0, 1)},
        "lstm": {name for name, _ in case.model.named_parameters() if name.startswith("rnn.")},
        "tables": {"chosen"},
        "linear_over_positions": set(),
        "bert": set(),
    }  # fmt: skip
    assert through == expected[kind]
