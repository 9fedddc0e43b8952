"""`estimate_fisher` leaves the model, its modes and the random state as they were."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint
from fisher_checks import BATCH, assert_same_state, decorated, score, state_of
from models import CASES, classify
from torch import nn

import fishfast as ff


@pytest.mark.parametrize(
    "name",
    [
        "convnet_with_norms", "transformer_layer", "half_frozen", "lstm", "checkpointed_reentrant",
        "tied_by_modules", "spectral_norm", "experts_in_a_loop", "recurrent_time_first",
        "shifts_in_place",
    ],
)  # fmt: skip
def test_model_and_random_state_are_untouched(name):
    case = CASES[name]()
    model, seen = decorated(case)
    before = state_of(model)
    score(case)
    assert_same_state(before, state_of(model))
    assert seen
    assert "grad" not in seen
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)


def _through_data(model):
    model.count.data += 1


def _other_memory(model):
    model.count.data = torch.ones(5)


def _resized(model):
    model.count.resize_(7)


def _replaced(model):
    model.count = torch.ones(2)


def _filled_in(model):
    model.later = torch.ones(2)


def _registered(model):
    model.register_buffer("new", torch.ones(2), persistent=False)


@pytest.mark.parametrize(
    "change", [_through_data, _other_memory, _resized, _replaced, _filled_in, _registered]
)
def test_buffers_are_put_back_however_a_forward_changes_them(change):
    model = nn.Linear(6, 4)
    model.register_buffer("count", torch.zeros(3))
    model.register_buffer("later", None)
    count, memory = model.count, model.count.data_ptr()
    model.register_forward_hook(lambda module, *_: change(module))
    ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    assert list(model._buffers) == ["count", "later"]
    assert model.count is count
    assert change is _resized or model.count.data_ptr() == memory
    assert torch.equal(model.count, torch.zeros(3))
    assert model.later is None
    assert not model._non_persistent_buffers_set


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


class Cached(nn.Module):
    """LeViT, TinyViT: what eval mode computes once, train() drops."""

    def __init__(self):
        super().__init__()
        self.table, self.cache = nn.Parameter(torch.randn(6)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return x + 2 * self.table
        return x + self.cache.setdefault("table", 2 * self.table)


class Merged(nn.Linear):
    """loralib: eval() adds the update to the weight, train() takes it out again."""

    merged = False

    def __init__(self):
        super().__init__(6, 6)
        self.register_buffer("update", torch.ones(6, 6))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.update if mode else self.update
            self.merged = not mode
        return self


class Frozen(nn.BatchNorm1d):
    """Keeps its statistics fixed in train mode too."""

    def train(self, mode=True):
        return super().train(False)


class Whole(nn.Sequential):
    """Says in which mode it is by a name of its own."""

    mode = "train"

    def train(self, mode=True):
        self.mode = "train" if mode else "eval"
        return super().train(mode)


def own_state(model):
    return {
        "modes": [module.training for module in model.modules()],
        "caches": [dict(module.cache) for module in model.modules() if isinstance(module, Cached)],
        "merged": [module.merged for module in model.modules() if isinstance(module, Merged)],
        "mode": [module.mode for module in model.modules() if isinstance(module, Whole)],
    }


@pytest.mark.parametrize("modes", ["train", "eval", "mixed", "inner-eval"])
@pytest.mark.parametrize("fails", [False, True], ids=["scored", "refused"])
def test_modes_are_given_back_through_the_models_own_train(modes, fails):
    model = Whole(
        nn.Linear(6, 6), Cached(), nn.Sequential(Merged(), Frozen(6)), Cached(), nn.Linear(6, 4)
    )
    model.train(modes != "eval")
    if modes == "mixed":
        model[3].eval()
    elif modes == "inner-eval":
        model[2].eval()
    before, weight = own_state(model), model[2][0].weight.clone()

    def loss_fn(model, batch):
        assert not any(module.training for module in model.modules())
        assert model.mode == "eval"
        return classify(model, batch).mean() if fails else classify(model, batch)

    with pytest.raises(ValueError, match="got a scalar") if fails else contextlib.nullcontext():
        ff.estimate_fisher(model, [BATCH], loss_fn=loss_fn)
    after = own_state(model)
    if modes in ("eval", "mixed"):  # an eval mode's cache stays, as it would after a forward
        before["caches"][-1:], after["caches"][-1:] = [], []
    if modes == "eval":
        before["caches"], after["caches"] = [], []
    assert before == after
    torch.testing.assert_close(model[2][0].weight, weight)
    model(torch.randn(3, 6))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_called_without_gradients(context):
    case = CASES["transformer_layer"]()
    expected = score(case)
    with context():
        fisher = score(case)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(fisher[name], expected[name]) for name in expected)
    assert not any(s.requires_grad or s.is_inference() for s in fisher.values())


def halve(grad):
    return grad * 0.5


@pytest.mark.parametrize(
    "name",
    ["mlp", "bare_parameters", "custom_function"],
    ids=["batched", "where-it-meets-the-data", "one-at-a-time"],
)
def test_hooks_on_parameters_do_not_touch_the_scores_and_are_put_back(name):
    case = CASES[name]()
    expected = score(case)
    parameter = next(case.model.parameters())
    (plain,) = torch.autograd.grad(case.loss_fn(case.model, case.batches[0]).sum(), parameter)
    handle = parameter.register_hook(halve)
    hooks = parameter._backward_hooks

    fisher = score(case)
    assert all(torch.equal(fisher[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="got a scalar"):
        ff.estimate_fisher(case.model, case.batches, loss_fn=lambda model, batch: torch.zeros(()))
    assert parameter._backward_hooks is hooks

    case.loss_fn(case.model, case.batches[0]).sum().backward()
    torch.testing.assert_close(parameter.grad, plain / 2)
    handle.remove()
    parameter.grad = None
    case.loss_fn(case.model, case.batches[0]).sum().backward()
    torch.testing.assert_close(parameter.grad, plain)


@pytest.mark.parametrize("name", ["bare_parameters", "custom_function", "low_rank_updates"])
def test_scores_keep_no_graph_alive(name):
    """Neither do parameters: what was made for the scores is gone with them."""
    case = CASES[name]()
    outputs = []
    case.model.register_forward_hook(lambda module, inputs, out: outputs.append(weakref.ref(out)))
    fisher = score(case)
    assert all(s.grad_fn is None for s in fisher.values())
    gc.collect()
    assert outputs
    assert not any(out() is not None for out in outputs)


def test_an_interrupted_run_leaves_the_model_untouched():
    """A loss_fn that fails in the second batch, in the middle of it all."""
    case = CASES["checkpointed_reentrant"]()
    model, _ = decorated(case)
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        losses = classify(model, batch)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return losses

    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        ff.estimate_fisher(model, case.batches, loss_fn=loss_fn)
    assert_same_state(before, state_of(model))
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)
