"""`estimate_fisher` against a loop over single samples in float64, for models of every kind."""

from __future__ import annotations

import collections
import copy
import itertools

import models
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from models import CASES, HUGGINGFACE, classify, only, per_sample
from torch import nn
from torch.utils.checkpoint import checkpoint

import fishfast as ff

BATCH = (torch.randn(4, 6, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 3]))


def score(case, **options):
    return ff.estimate_fisher(case.model, case.batches, loss_fn=case.loss_fn, **options)


def samples_of(case, batch):
    """Return the batch as batches of one."""
    taken = (case.take(batch, b) for b in itertools.count())
    return list(itertools.takewhile(lambda one: one is not None, taken))


def truth(case, dtype=torch.float64, **options):
    return oracle.fisher_by_loop(
        case.model, case.batches, case.loss_fn, case.take, dtype=dtype, **options
    )


def assert_as_exact_as_a_loop(fisher, exact, plain, power=2, rounding=1e-6):
    """Error against float64 at most twice that of a loop over samples in plain torch.

    Two allowances for rounding, where the loop happens to be lucky. ``rounding``: 16 units in the
    last place of fp32 on a tensor's norm, for sums that are added in another order through the
    layers above. And gradients that cancel to zero (a key bias under softmax) are rounding alone,
    of 1e-6 times the largest gradient.
    """
    assert list(fisher) == list(exact)
    largest = max(np.abs(values).max(initial=0) for values in exact.values())
    cancelled = largest * (1e-12 if power == 2 else 1e-6)
    for name, found in fisher.items():
        assert found.dtype == torch.float32
        assert tuple(found.shape) == exact[name].shape
        error = np.linalg.norm(found.double().numpy() - exact[name])
        allowed = 2 * np.linalg.norm(plain[name] - exact[name])
        allowed += rounding * np.linalg.norm(exact[name]) + cancelled * found.numel() ** 0.5
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def state_of(model):
    """All that a refusal or a call must leave as it was; tensors by identity, version and value."""
    return {
        "modes": [module.training for module in model.modules()],
        "tensors": [
            (name, id(t), t._version, t.requires_grad, t.detach().clone())
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        ],
        "grads": [
            (id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()
        ],
        "hooks": [
            [len(value) for name, value in vars(module).items() if "hooks" in name]
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "overrides": torch._C._len_torch_function_stack(),
        "multithreading": torch._C._is_multithreading_enabled(),
    }


def assert_same_state(before, after):
    flat_before, flat_after = (torch.utils._pytree.tree_leaves(state) for state in (before, after))
    assert len(flat_before) == len(flat_after)
    for old, new in zip(flat_before, flat_after, strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


# ---- exact --------------------------------------------------------------------------------------


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
    assert set(fisher.fallback) == case.fallback
    assert fisher.num_samples == sum(len(samples_of(case, batch)) for batch in case.batches)


@pytest.mark.parametrize("kind", HUGGINGFACE)
def test_transformers_with_their_own_loss(kind):
    """Without a loss_fn, each sample's loss is what the model says when it gets it alone."""
    case = models.huggingface(kind)
    fisher = ff.estimate_fisher(case.model, case.batches)
    assert fisher.num_samples == 7
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    batched = {
        name for name, module in case.model.named_modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and "gate" not in name
    }  # fmt: skip
    tied = {"lm_head", "cls.predictions.decoder"}
    assert not {n for n in fisher.fallback if n.rpartition(".")[0] in batched - tied}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "convnet_with_norms", "embedding", "layer_norms", "lstm"])
def test_other_dtypes_have_fp32_scores(name, dtype):
    case = CASES[name]()
    exact, plain = truth(case), truth(case, dtype)
    case.model.to(dtype)
    case.batches = [oracle.in_dtype(batch, dtype) for batch in case.batches]
    # Half precision: one unit of bf16 in a gradient, squared, on top of twice the loop's error.
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-6
    assert_as_exact_as_a_loop(score(case), exact, plain, rounding=rounding)


AUTOCAST = ["mlp", "convnet_with_norms", "layer_norms", "embedding", "transformer_layer"]


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


# ---- samples and batches ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["convnet_with_norms", "embedding", "transformer_layer", "positions"]
)
def test_batch_sizes_do_not_matter(name):
    case = CASES[name]()
    exact, plain = truth(case), truth(case, torch.float32)
    singles = [one for batch in case.batches for one in samples_of(case, batch)]
    case.batches = singles
    fisher = score(case)
    assert fisher.num_samples == len(singles)
    assert_as_exact_as_a_loop(fisher, exact, plain)


@pytest.mark.parametrize("name", ["convnet_with_norms", "embedding", "lstm", "tied_language_model"])
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


@pytest.mark.parametrize("name", ["convnet_with_norms", "embedding", "transformer_layer"])
def test_the_same_bits_twice(name):
    case = CASES[name]()
    first, second = score(case), score(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- what is scored -----------------------------------------------------------------------------


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


# ---- the model is left as it was ----------------------------------------------------------------


def decorated(case):
    """Give a model everything that could be lost: mixed modes, gradients, hooks, and more."""
    model = case.model.train()
    for module in list(model.modules())[1::2]:
        module.eval()
    seen = []
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    next(model.modules()).register_forward_hook(lambda *_: seen.append(1))
    trainable = [p for p in model.parameters() if p.requires_grad]
    trainable[0].register_post_accumulate_grad_hook(lambda *_: seen.append("grad"))
    return model, seen


@pytest.mark.parametrize("name", ["convnet_with_norms", "transformer_layer", "half_frozen", "lstm"])
def test_model_and_random_state_are_untouched(name):
    case = CASES[name]()
    model, seen = decorated(case)
    before = state_of(model)
    score(case)
    assert_same_state(before, state_of(model))
    assert seen
    assert "grad" not in seen


def test_scoring_happens_in_eval_mode_and_the_optimizer_goes_on():
    case = CASES["convnet_with_norms"]()
    assert case.model.training
    modes = []
    case.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    score(case)
    assert set(modes) == {False}
    case.loss_fn(case.model, case.batches[0]).mean().backward()
    assert all(p.grad is not None for p in case.model.parameters())


def test_eval_mode_off_keeps_the_modes():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))
    model[1].eval()
    model[2].eval()
    modes = []
    model[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    fisher = ff.estimate_fisher(model, [BATCH], loss_fn=classify, eval_mode=False)
    assert modes == [True]
    expected = ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    assert all(torch.equal(fisher[name], expected[name]) for name in fisher)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_called_without_gradients(context):
    case = CASES["transformer_layer"]()
    expected = score(case)
    with context():
        fisher = score(case)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(fisher[name], expected[name]) for name in expected)
    assert not any(s.requires_grad or s.is_inference() for s in fisher.values())


def test_scores_keep_no_graph_alive():
    case = CASES["bare_parameters"]()
    assert all(s.grad_fn is None for s in score(case).values())


# ---- losses of batches with labels --------------------------------------------------------------


class Heads(nn.Module):
    """A model in the way of transformers, with any task."""

    def __init__(self, outputs, **config):
        super().__init__()
        self.loss_type = config.pop("loss_type", None)
        self.config = type("Config", (), config)
        self.linear = nn.Linear(6, outputs)
        self.got = []

    def forward(self, x, **others):
        self.got.append(sorted(others))
        return {"logits": self.linear(x)}


def mean_squares(logits, labels):
    return F.mse_loss(logits, labels)


def bce(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels.float())


@pytest.mark.parametrize(
    ("model", "labels", "own_loss"),
    [
        pytest.param(Heads(3), torch.tensor([0, 2, 1, 2]), F.cross_entropy, id="classes"),
        pytest.param(
            Heads(3, loss_type="ForSequenceClassification"), torch.tensor([0, 2, 1, 2]),
            F.cross_entropy, id="classes-by-loss-type",
        ),
        pytest.param(
            Heads(1), torch.randn(4), lambda logits, y: F.mse_loss(logits.squeeze(1), y),
            id="number",
        ),
        pytest.param(Heads(1), torch.randn(4, 1), mean_squares, id="number-in-a-column"),
        pytest.param(
            Heads(3, problem_type="regression"), torch.randn(4, 3), mean_squares, id="numbers"
        ),
        pytest.param(Heads(3), torch.randint(0, 2, (4, 3)).float(), bce, id="several-labels"),
        pytest.param(
            Heads(3, problem_type="multi_label_classification"), torch.randint(0, 2, (4, 3)), bce,
            id="several-labels-by-name",
        ),
        pytest.param(
            Heads(2, problem_type="single_label_classification"),
            torch.tensor([[0], [1], [1], [0]]),
            lambda logits, y: F.cross_entropy(logits, y.view(-1)), id="classes-in-a-column",
        ),
    ],
)  # fmt: skip
def test_default_losses_of_heads(model, labels, own_loss):
    batch = {"x": BATCH[0], "labels": labels}

    def loss_fn(model, batch):
        (one,) = [own_loss(model.linear(batch["x"]), batch["labels"])]
        return one.unsqueeze(0)

    fisher = ff.estimate_fisher(model, [batch])
    case = models.Case.__new__(models.Case)
    case.model, case.batches, case.loss_fn, case.take = model, [batch], loss_fn, only
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert model.got == [[]]  # labels are not handed on: the model's own loss is not needed


def next_tokens(logits, labels):
    """The mean over a sample's own labels, shifted by one."""
    return F.cross_entropy(logits[0, :-1], labels[0, 1:])


def same_tokens(logits, labels):
    return F.cross_entropy(logits[0], labels[0])


@pytest.mark.parametrize(
    ("config", "own_loss"),
    [
        pytest.param({"loss_type": "ForCausalLM"}, next_tokens, id="causal"),
        pytest.param({"loss_type": "ForMaskedLM"}, same_tokens, id="masked"),
        pytest.param({"loss_type": "ForTokenClassification"}, same_tokens, id="token-classes"),
        pytest.param(
            {"loss_type": "ForConditionalGeneration", "is_encoder_decoder": True}, same_tokens,
            id="encoder-decoder",
        ),
        pytest.param(
            {"loss_type": "ForConditionalGeneration"}, next_tokens, id="decoder-with-images"
        ),
        pytest.param(
            {"loss_type": "ForConditionalGeneration",
             "text_config": type("T", (), {"is_encoder_decoder": True})}, same_tokens,
            id="encoder-decoder-with-images",
        ),
    ],
)  # fmt: skip
def test_default_losses_of_tokens(config, own_loss):
    model = Heads(5, **config)
    labels = torch.randint(0, 5, (4, 7))
    labels[0, 3:] = labels[1, :6] = labels[2, ::2] = -100
    batch = {"x": torch.randn(4, 7, 6), "labels": labels}

    def loss_fn(model, batch):
        return own_loss(model.linear(batch["x"]), batch["labels"]).unsqueeze(0)

    fisher = ff.estimate_fisher(model, [batch])
    case = models.Case.__new__(models.Case)
    case.model, case.batches, case.loss_fn, case.take = model, [batch], loss_fn, only
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))


def test_a_sample_without_labels_counts_and_scores_zero():
    model = Heads(5, loss_type="ForCausalLM")
    batch = {"x": torch.randn(2, 7, 6), "labels": torch.full((2, 7), -100)}
    batch["labels"][1] = 3
    fisher = ff.estimate_fisher(model, [batch])
    alone = ff.estimate_fisher(model, [only(batch, 1)])
    assert fisher.num_samples == 2
    for name in fisher:
        torch.testing.assert_close(fisher[name], alone[name])


def test_any_mapping_is_a_batch():
    model = Heads(3)
    batch = {"x": BATCH[0], "labels": torch.tensor([0, 2, 1, 2])}
    expected = ff.estimate_fisher(model, [batch])
    fisher = ff.estimate_fisher(model, [collections.UserDict(batch)])
    assert all(torch.equal(fisher[name], expected[name]) for name in fisher)


# ---- refusals -----------------------------------------------------------------------------------


def nan_losses(model, batch):
    losses = classify(model, batch)
    return losses * torch.tensor([1, 1, torch.nan, 1])


def infinite_gradients(model, batch):
    return (model(batch[0]).square().sum(1) * 0).sqrt()


def overflowing_gradients(model, batch):
    return classify(model, batch) * 1e25


def mean_expanded(model, batch):
    losses = classify(model, batch)
    return losses.mean().expand(len(losses))


def contrastive(model, batch):
    out = model(batch[0])
    return F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")


def neighbours(model, batch):
    out = model(batch[0])
    return (out - out.roll(1, 0)).square().sum(1)


def two_halves(model, batch):
    """Four losses, each between a sample and the one half a batch away."""
    out = model(batch[0])
    return (out - out.roll(2, 0)).square().sum(1)


def history(model, batch):
    """Each loss reads the samples before its own; nobody reads the last one, the largest."""
    out = model(batch[0]).cumsum(0)
    return out.square().sum(1) * torch.tensor([1, 1, 1, 1000])


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (lambda m, b: classify(m, b).mean(), r"shape \[B\]; got a scalar; use reduction='none'"),
        (lambda m, b: m(b[0])[:, :1], r"shape \[B\]; got shape \(4, 1\); use reduction='none'"),
        (lambda m, b: m(b[0]), r"shape \[B\]; got shape \(4, 4\)"),
        (lambda m, b: m(b[0]).flatten(), "got 16 losses for a batch of 4 .one per token"),
        (lambda m, b: classify(m, b).tolist(), "a tensor of per-sample losses; got list"),
        (lambda m, b: None, "a tensor of per-sample losses; got NoneType"),
        (lambda m, b: classify(m, b).detach(), "got 4 losses with requires_grad=False"),
        (lambda m, b: classify(m, b)[:0], "got 0 losses with requires_grad=True"),
        (nan_losses, "must return finite losses; got nan for sample 2"),
        (lambda m, b: classify(m, b) / 0, "must return finite losses; got inf for sample 0"),
        (infinite_gradients, "the scores of '0.weight' are not finite: a sample's gradient is NaN"),
        (overflowing_gradients, "scores of '0.weight' are not finite: .* above 1.8e19"),
        (mean_expanded, "losses that depend on one sample each; .* in every layer"),
        (contrastive, "losses that depend on one sample each; .* in every layer"),
        (neighbours, "losses that depend on one sample each; .* in every layer"),
        (history, "losses that depend on one sample each; .* in every layer"),
        (two_halves, "losses that depend on one sample each; .* in every layer"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("<>"),
)  # fmt: skip
def test_bad_losses_are_refused_and_the_model_is_untouched(loss_fn, text):
    case = models.mlp()
    model, _ = decorated(case)
    before = state_of(model)
    with pytest.raises(ValueError, match=text):
        ff.estimate_fisher(model, [BATCH, BATCH], loss_fn=loss_fn)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"batches": []}, ValueError, "batches must give at least one sample; got none"),
        ({"batches": {"x": BATCH[0]}}, TypeError, r"got one dict; pass \[batch\]"),
        ({"batches": BATCH[0]}, TypeError, r"got one Tensor; pass \[batch\]"),
        ({"batches": collections.UserDict()}, TypeError, "got one UserDict"),
        ({"batches": "digits"}, TypeError, "got one str"),
        ({"batches": 3}, TypeError, "batches must be an iterable of batches; got one int"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1; got 0"),
        ({"num_samples": -5}, ValueError, "num_samples must be at least 1; got -5"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be an integer; got 2.5"),
        ({"num_samples": True}, TypeError, "num_samples must be an integer; got True"),
        ({"power": 3}, ValueError, r"power must be 2 \(squares\) or 1 .*; got 3"),
        ({"power": "2"}, ValueError, r"power must be 2 \(squares\) or 1 .*; got '2'"),
        ({"fisher_type": "true"}, ValueError, "fisher_type must be 'empirical'; got 'true'"),
        ({"loss_fn": None}, TypeError, r"mappings with 'labels'; got a tuple; pass loss_fn"),
        ({"loss_fn": None, "batches": [{"x": BATCH[0]}]}, TypeError, r"got a mapping with \['x'\]"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused_and_the_model_is_untouched(arguments, error, text):
    model, _ = decorated(models.mlp())
    before = state_of(model)
    with pytest.raises(error, match=text):
        ff.estimate_fisher(model, **{"batches": [BATCH], "loss_fn": classify, **arguments})
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.Linear(6, 4).requires_grad_(False)],
    ids=["no-parameters", "frozen"],
)
def test_models_without_trainable_parameters_are_refused(model):
    with pytest.raises(ValueError, match="model must have parameters with requires_grad=True"):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify)


def test_complex_parameters_are_refused():
    model = nn.Linear(6, 4)
    model.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="must be real .*; got torch.complex64 for 'phase'"):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.BatchNorm1d(6), "BatchNorm1d in train mode"),
        (nn.Dropout(0.1), "Dropout in train mode"),
        (nn.MultiheadAttention(6, 2, dropout=0.1), "MultiheadAttention in train mode"),
        (nn.LSTM(6, 6, 2, dropout=0.1), "LSTM in train mode"),
    ],
    ids=["batch-norm", "dropout", "attention", "lstm"],
)
def test_eval_mode_off_refuses_modules_that_mix_samples_or_add_noise(module, named):
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(module), nn.Linear(6, 4))
    before = state_of(model)
    with pytest.raises(
        ValueError, match=f"eval_mode=False needs '1.0' in eval mode; got a {named}"
    ):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify, eval_mode=False)
    assert_same_state(before, state_of(model))


def test_batch_norm_without_running_statistics_is_refused():
    """It mixes samples in eval mode too."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="'1' must have running statistics; got a BatchNorm1d"):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify)


@pytest.mark.parametrize(
    ("model", "batch", "error", "text"),
    [
        (Heads(5), {"x": torch.randn(2, 7, 6), "labels": torch.ones(2, 7).long()}, ValueError,
         r"loss_fn is needed for logits of shape \(2, 7, 5\) with loss_type None"),
        (Heads(5, loss_type="ForCTC"), {"x": BATCH[0], "labels": BATCH[1]}, ValueError,
         r"loss_fn is needed for logits of shape \(4, 5\) with loss_type 'ForCTC'"),
    ],
)  # fmt: skip
def test_unknown_tasks_ask_for_a_loss_fn(model, batch, error, text):
    with pytest.raises(error, match=text):
        ff.estimate_fisher(model, [batch])


def test_an_output_without_logits_asks_for_a_loss_fn():
    class Other(Heads):
        def forward(self, x):
            return {"scores": self.linear(x)}

    with pytest.raises(
        TypeError, match=r"no 'logits'; got a mapping with \['scores'\]; pass loss_fn"
    ):
        ff.estimate_fisher(Other(3), [{"x": BATCH[0], "labels": BATCH[1] % 3}])


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


def test_a_reentrant_checkpoint_is_not_scored_zero():
    """Its inner graph is hidden from the audit, and from torch.autograd.grad itself."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(checkpoint(self.inner, self.first(x), use_reentrant=True))

    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        ff.estimate_fisher(Hidden(), [BATCH], loss_fn=classify)


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
    assert "create_graph=True" in fisher.fallback["0.weight"]


def test_compiled_models_are_scored_exactly():
    case = models.mlp()
    expected = score(case)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="aot_eager")
    compiled(case.batches[0][0])  # its graph must not be used for the scores
    before = state_of(case.model)
    fisher = ff.estimate_fisher(compiled, case.batches, loss_fn=classify)
    for name, values in expected.items():
        torch.testing.assert_close(fisher[f"_orig_mod.{name}"], values)
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
    assert set(fisher.fallback) == {"inner.weight", "inner.bias"}


def test_copies_of_a_model_agree_bit_for_bit():
    case = models.convnet_with_norms()
    twin = copy.deepcopy(case.model)
    first = score(case)
    second = ff.estimate_fisher(twin, case.batches, loss_fn=case.loss_fn)
    assert all(torch.equal(first[name], second[name]) for name in first)
