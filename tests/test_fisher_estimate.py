"""`estimate_fisher` end to end: its arguments, its progress bar, and what its result can do."""

from __future__ import annotations

import random
import time

import pytest
import torch
from fisher_checks import assert_same_state, decorated, score, state_of
from models import CASES, classify, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fishfast as ff

SIZES = (4, 3, 2)
_GENERATOR = torch.Generator().manual_seed(13)
BATCHES = [
    (torch.randn(b, 6, generator=_GENERATOR), torch.randint(0, 4, (b,), generator=_GENERATOR))
    for b in SIZES
]


def first(model, batch):
    return model(batch[0])


TYPES = {
    "empirical": {"loss_fn": classify},
    "exact": {"fisher_type": "exact", "outputs_fn": first},
    "sampled": {"fisher_type": "sampled", "outputs_fn": first},
}
KINDS = pytest.mark.parametrize("kind", TYPES)
EXACT, SAMPLED = TYPES["exact"], TYPES["sampled"]


def assert_same_scores(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(values, other[name]) for name, values in one.items())


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"loss_fn": classify, "outputs_fn": first}, ValueError,
         "outputs_fn and head go with .*; got fisher_type='empirical'; pass loss_fn"),
        ({"loss_fn": classify, "head": "softmax"}, ValueError, "got fisher_type='empirical'"),
        ({**EXACT, "loss_fn": classify}, ValueError,
         "loss_fn goes with fisher_type='empirical'; got fisher_type='exact', whose labels come"),
        ({**SAMPLED, "loss_fn": classify}, ValueError, "got fisher_type='sampled', whose labels"),
        ({**EXACT, "outputs_fn": "logits"}, TypeError, "outputs_fn must be a function; got str"),
        ({"fisher_type": "exact", "head": "softmax"}, ValueError,
         "head goes with outputs_fn; got head="),
        ({**EXACT, "head": "logistic"}, ValueError,
         "head must be one of 'softmax', 'sigmoid', 'gaussian', 'tokens'; got 'logistic'"),
        ({**EXACT, "num_label_samples": 2}, ValueError,
         "num_label_samples goes with fisher_type='sampled'; got 2 with 'exact'"),
        ({"loss_fn": classify, "num_label_samples": 2}, ValueError, "got 2 with 'empirical'"),
        ({**SAMPLED, "num_label_samples": 0}, ValueError, "must be at least 1; got 0"),
        ({**SAMPLED, "num_label_samples": 1.5}, TypeError, "must be an integer; got 1.5"),
        ({**EXACT, "fisher_type": "true"}, ValueError,
         "fisher_type must be one of 'empirical', 'sampled', 'exact'; got 'true'"),
        ({**EXACT, "head": "tokens"}, ValueError, r"shape \[B, T, V\] for head='tokens'; got"),
        ({**EXACT, "head": "sigmoid", "power": 1}, ValueError,
         r"power=1 needs a row for each of 2\*\*4 label vectors .* use power=2, or 'sampled'"),
        ({**EXACT, "head": "gaussian", "power": 1}, ValueError, "for infinitely many labels"),
        ({"fisher_type": "exact"}, TypeError, "without an outputs_fn must be mappings; got"),
        ({"loss_fn": classify, "backend": "cuda"}, ValueError,
         r"backend must be 'auto' or one of \('cpu', 'torch', 'triton'\) for fisher on cpu; got"),
        ({"loss_fn": classify, "backend": "triton"}, RuntimeError, "asked for but cannot run"),
        ({"loss_fn": classify, "resume_path": "none/f"}, FileNotFoundError,
         "the folder of 'none/f' must exist"),
        ({"loss_fn": classify, "resume_path": "f", "save_every": -1}, ValueError,
         "save_every must be at least 0 seconds; got -1"),
    ],
)  # fmt: skip
def test_arguments_are_checked(arguments, error, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, _ = decorated(mlp())
    before = state_of(model)
    with pytest.raises(error, match=text):
        ff.estimate_fisher(model, BATCHES, **arguments)
    assert_same_state(before, state_of(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fisher_type", ["exact", "sampled"])
@pytest.mark.parametrize(
    ("outputs_fn", "text"),
    [
        (lambda m, b: None, r"must return outputs \[B, ...\] that depend on parameters; got"),
        (lambda m, b: m(b[0]).tolist(), r"must return outputs \[B, ...\]"),
        (lambda m, b: m(b[0]).detach(), r"that depend on parameters; got shape \(4, 4\)"),
        (lambda m, b: m(b[0])[:0], "batches must give at least one sample; got none"),
        (lambda m, b: m(b[0]).sum(), r"that depend on parameters; got shape \(\)"),
        (lambda m, b: m(b[0])[:, :1], r"C >= 2, for head='softmax'; got \(4, 1\)"),
        (lambda m, b: m(b[0])[:, None], r"for head='softmax'; got \(4, 1, 4\); 'tokens' is for"),
        (lambda m, b: m(b[0]) * torch.nan, "outputs must be finite; got NaN .* for sample 0"),
        (lambda m, b: (m(b[0]) @ torch.ones(4, len(b[0]))).T @ m(b[0]), "depend on one sample"),
        (lambda m, b: m(b[0]).cumsum(0), "depend on one sample each; the gradient of one"),
    ],
)
def test_outputs_are_checked(fisher_type, outputs_fn, text):
    model, _ = decorated(mlp())
    before = state_of(model)
    with pytest.raises(ValueError, match=text):
        ff.estimate_fisher(model, BATCHES, fisher_type=fisher_type, outputs_fn=outputs_fn)
    assert_same_state(before, state_of(model))


def test_a_language_model_has_no_exact_fisher():
    case = CASES["tied_language_model"]()
    with pytest.raises(ValueError, match=r"each of V\*\*T label sequences .*; use 'sampled' with"):
        ff.estimate_fisher(
            case.model, case.batches, fisher_type="exact", head="tokens",
            outputs_fn=lambda model, tokens: model(tokens),
        )  # fmt: skip


# ---- the model, after errors too ----------------------------------------------------------------


class LoaderError(Exception):
    """What a broken loader raises."""


def broken(batches):
    yield batches[0]
    raise LoaderError


def breaking(function):
    """Raise in the second batch, after its forward."""
    calls = []

    def broken_function(model, batch):
        found = function(model, batch)
        calls.append(1)
        if len(calls) == 2:
            raise LoaderError
        return found

    return broken_function


@KINDS
@pytest.mark.parametrize("where", ["nowhere", "loader", "function"])
@pytest.mark.parametrize("name", ["mlp", "bare_parameters", "convnet_with_norms"])
def test_model_hooks_and_random_state_are_as_before(kind, where, name):
    case = CASES[name]()
    model, _ = decorated(case)
    parameter = next(model.parameters())
    parameter.register_hook(lambda grad: grad * 2)
    hooks = parameter._backward_hooks
    before, pythons = state_of(model), random.getstate()
    options = dict(TYPES[kind])
    if where == "function":
        (function,) = {"loss_fn", "outputs_fn"} & set(options)
        options[function] = breaking(options[function])
    batches = case.batches if where != "loader" else broken(case.batches)
    if where == "nowhere":
        ff.estimate_fisher(model, batches, **options)
    else:
        with pytest.raises(LoaderError):
            ff.estimate_fisher(model, batches, **options)
    assert_same_state(before, state_of(model))
    assert parameter._backward_hooks is hooks
    assert pythons == random.getstate()


# ---- progress -----------------------------------------------------------------------------------


def test_no_progress_bar_by_default(capsys):
    ff.estimate_fisher(mlp().model, BATCHES, loss_fn=classify)
    assert capsys.readouterr() == ("", "")


@KINDS
def test_a_progress_bar_says_samples_a_second_and_how_many_are_left(capsys, kind):
    x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    model = mlp().model
    shown = ff.estimate_fisher(model, loader, **TYPES[kind], progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "100%" in printed.err
    assert " 9/9 [" in printed.err
    assert "samples/s]" in printed.err
    assert_same_scores(shown, ff.estimate_fisher(model, loader, **TYPES[kind]))
    ff.estimate_fisher(model, iter(BATCHES), **TYPES[kind], num_samples=6, progress=True)
    assert " 6/6 [" in capsys.readouterr().err
    ff.estimate_fisher(model, iter(BATCHES), **TYPES[kind], progress=True)
    assert "9 samples [" in capsys.readouterr().err  # without a length, no share of it


def test_a_progress_bar_goes_on_where_the_run_does(capsys, tmp_path):
    model, path = mlp().model, tmp_path / "running"
    with pytest.raises(LoaderError):
        ff.estimate_fisher(model, broken(BATCHES), loss_fn=classify, resume_path=path)
    options = {"loss_fn": classify, "resume_path": path, "num_samples": 9, "progress": True}
    ff.estimate_fisher(model, BATCHES, **options)
    printed = capsys.readouterr().err
    assert " 4/9 [" in printed
    assert " 9/9 [" in printed


# ---- the result ---------------------------------------------------------------------------------


@KINDS
def test_results_add_up(kind):
    model = mlp().model
    parts = [ff.estimate_fisher(model, [batch], **TYPES[kind], seed=7) for batch in BATCHES]
    total = parts[0] + parts[1] + parts[2]
    assert (total.num_samples, total.num_batches) == (9, 3)
    assert total.passes["backward"] == sum(part.passes["backward"] for part in parts)
    for name, values in total.items():
        assert torch.equal(values, parts[0][name] + parts[1][name] + parts[2][name])
    if kind != "sampled":  # whose draws depend on which come first
        whole = ff.estimate_fisher(model, BATCHES, **TYPES[kind])
        for name, values in whole.items():
            torch.testing.assert_close(total[name], values)


def test_results_of_another_kind_do_not_add_up():
    model = mlp().model
    empirical, exact = (ff.estimate_fisher(model, BATCHES, **TYPES[k]) for k in list(TYPES)[:2])
    with pytest.raises(ValueError, match="fisher_type is 'empirical' here and 'exact' there"):
        empirical + exact
    with pytest.raises(ValueError, match="power is 2 here and 1 there"):
        empirical + ff.estimate_fisher(model, BATCHES, loss_fn=classify, power=1)


@pytest.mark.parametrize("name", ["convnet_with_norms", "custom_function"])
def test_a_saved_result_is_the_result(name, tmp_path):
    fisher = score(CASES[name]())
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = ff.Fisher.load(tmp_path / "fisher.safetensors")
    assert_same_scores(loaded, fisher)
    timeless = ff.Fisher(fisher, **{**fisher.facts(), "seconds": {}})
    assert loaded.facts() == timeless.facts()
    assert loaded.report() == timeless.report()
    mask, same = (ff.top_k_mask(scores, density=0.1) for scores in (fisher, loaded))
    assert mask.fingerprint == same.fingerprint


def test_passes_and_seconds_are_recorded():
    case = CASES["custom_function"]()
    start = time.perf_counter()
    fisher = score(case)
    wall = time.perf_counter() - start
    batches = len(case.batches)
    assert fisher.num_batches == batches
    assert set(fisher.fallback) == case.fallback == {"inner.weight", "inner.bias"}
    assert fisher.passes["forward"] == fisher.passes["backward"] == batches
    assert fisher.passes["fallback"] == fisher.num_samples
    assert 1 <= fisher.passes["probe"] <= 10 + 3 * batches  # a custom function is always checked
    assert all(seconds > 0 for seconds in fisher.seconds.values())
    assert sum(fisher.seconds.values()) <= wall
    report = fisher.report()
    assert f"fallback: 2 tensors, {fisher.num_samples} extra backward passes" in report
    for name in fisher:
        assert name in report
    assert "one sample at a time: used by" in report


def test_scores_are_fp32_of_every_trainable_parameter_and_contiguous():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).bfloat16()
    model[0].bias.requires_grad_(False)
    model[0].weight = nn.Parameter(model[0].weight.detach().T.contiguous().T)
    batches = [(x.bfloat16(), y) for x, y in BATCHES]
    for options in TYPES.values():
        fisher = ff.estimate_fisher(model, batches, **options)
        assert list(fisher) == ["0.weight", "2.weight", "2.bias"]
        for name, values in fisher.items():
            assert values.shape == model.get_parameter(name).shape
            assert values.dtype == torch.float32
            assert values.is_contiguous()
            assert (values >= 0).all()
            assert values.any()
