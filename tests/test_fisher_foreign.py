"""Scripted parts, tensors of other layouts, quantized weights, hooks of other libraries."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import (
    BATCH,
    assert_as_exact_as_a_loop,
    assert_same_state,
    score,
    state_of,
    truth,
)
from models import Case, classify
from torch import nn

import fishfast as ff

GENERATOR = torch.Generator().manual_seed(4)


class Counter(nn.Module):
    """Counts in a buffer, and has one more that it replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        self.calls.add_(1)
        self.last = x.sum()
        return torch.tanh(self.inner(x))


def scripted(frozen, part):
    part.requires_grad_(not frozen)
    return torch.jit.script(part)


def traced(frozen, part):
    part.requires_grad_(not frozen)
    return torch.jit.trace(part, torch.randn(4, 6, generator=GENERATOR))


def part():
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    ("convert", "make"), [(scripted, part), (scripted, Counter), (traced, part)],
    ids=["script", "script-with-buffers", "trace"],
)  # fmt: skip
def test_parts_of_torchscript(convert, make, frozen):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), make(), nn.Linear(6, 4))
    batches = [BATCH, (BATCH[0][:3] + 1, BATCH[1][:3])] * 2  # compiled at the second call
    exact, loop = (truth(Case(plain, batches, classify), t) for t in (torch.float64, torch.float32))
    model = nn.Sequential(plain[0], convert(frozen, plain[1]), plain[2])
    before = [buffer.clone() for buffer in model.buffers()]
    names = {f"1.{name}" for name, _ in plain[1].named_parameters()}
    modes = [module.training for module in model.modules()]

    fisher = ff.estimate_fisher(model, batches, loss_fn=classify)
    wanted = [{n: v for n, v in found.items() if not frozen or n not in names}
              for found in (exact, loop)]  # fmt: skip
    assert_as_exact_as_a_loop(fisher, *wanted)
    assert set(fisher.fallback) == (set() if frozen else names)
    assert all(map(torch.equal, before, model.buffers()))
    assert [module.training for module in model.modules()] == modes


class Ragged(nn.Module):
    """Layers over samples of different lengths: `inner` sees a nested tensor, `out` does not."""

    def __init__(self, norm=False):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(6) if norm else nn.Identity()
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x):
        hidden = torch.tanh(self.norm(self.inner(x)) + self.shift)
        return self.out(hidden.to_padded_tensor(0.0).sum(1))


class Padded(Ragged):
    """The same on one sample that is not nested."""

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.inner(x)) + self.shift).sum(1))


@pytest.mark.parametrize("norm", [False, True])
def test_nested_tensors_are_left_to_autograd(norm):
    rows = [torch.randn(n, 4, generator=GENERATOR) for n in (3, 5, 2)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    torch.manual_seed(0)
    model = Ragged(norm)
    fisher = ff.estimate_fisher(model, [(nested, torch.arange(3))] * 2, loss_fn=classify)
    same = Padded(norm)
    same.load_state_dict(model.state_dict())
    alone = [(x[None], torch.tensor([b])) for b, x in enumerate(rows)] * 2
    case = Case(nn.Identity(), alone, classify)
    case.model = same
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert set(fisher.roads) - set(fisher.fallback) == {"out.weight", "out.bias"}


class Int8Weight(torch.Tensor):
    """A trained weight in int8 with a scale for each row, as torchao has it."""

    @staticmethod
    def __new__(cls, ints, scale):
        return torch.Tensor._make_wrapper_subclass(cls, ints.shape, dtype=scale.dtype)

    def __init__(self, ints, scale):
        self.ints, self.scale = ints, scale

    def dense(self):
        return self.ints * self.scale[:, None]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return _Int8Linear.apply(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].ints, args[0].scale)
        raise NotImplementedError(f"an int8 weight cannot {func}")


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.dense().T + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.dense(), grad.T @ x, grad.sum(0)


@pytest.mark.parametrize("where", ["first", "last"])
def test_quantized_weights_that_are_trained_are_left_to_autograd(where):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    layer = plain[0 if where == "first" else 2]
    ints, scale = torch.randint(-9, 9, layer.weight.shape, dtype=torch.int8), torch.rand(6)
    weight = Int8Weight(ints, scale[: len(ints)])
    with torch.no_grad():
        layer.weight.copy_(weight.dense())
    case = Case(nn.Identity(), [BATCH, BATCH], classify)
    case.model = plain
    exact, loop = truth(case), truth(case, torch.float32)
    layer.weight = nn.Parameter(weight)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, exact, loop)
    name = "0" if where == "first" else "2"
    assert fisher.roads[f"{name}.weight"] == "one sample at a time: a Int8Weight, which has no rule"
    assert set(fisher.fallback) == {f"{name}.weight", f"{name}.bias"}
    assert all(type(values) is torch.Tensor for values in fisher.values())


def owner_of_hooks(module_name, enabled=True):
    class GradSampleModule:
        hooks_enabled = enabled

        def keep(self, module, inputs, out):
            self.kept = inputs

        def take(self, module, grad_input, grad_output, mean):
            return None

    GradSampleModule.__module__ = module_name
    return GradSampleModule()


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_the_hooks_of_opacus_are_refused_by_name(kind, where):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    owner = owner_of_hooks("opacus.grad_sample.grad_sample_module")
    if kind == "forward":
        model[where].register_forward_hook(owner.keep)
    else:
        model[where].register_full_backward_hook(functools.partial(owner.take, mean=True))
    before = state_of(model)
    text = r"hooks of Opacus' GradSampleModule.*disable_hooks\(\) before.*to_standard_module\(\)"
    with pytest.raises(ValueError, match=text):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    "owner",
    [owner_of_hooks("opacus.grad_sample", enabled=False), owner_of_hooks("opacus_like.hooks")],
    ids=["disabled", "of-another-library"],
)
def test_other_hooks_are_none_of_ours(owner):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    expected = ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    model[0].register_forward_hook(owner.keep)
    fisher = ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    assert all(torch.equal(fisher[name], expected[name]) for name in fisher)
