"""Each weight keeps its gradient tap, which is read again as long as nothing about it changes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from copying import pickled, saved_by_torch
from stepping import same_bits
from torch import Tensor, nn
from train_only_modules import mask_over_all, numbers

import fishfast as ff
from fishfast.training.gradient import weight_tap

X = numbers(4, 6)


@pytest.fixture
def tuned() -> Iterator[ff.SparseTuning]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    gc.disable()  # a full collection drops all taps
    yield ff.train_only(model, mask_over_all(model))
    gc.enable()


def node(tuned: ff.SparseTuning) -> object:
    """Return the tap's node of the first weight."""
    return tuned.model[0].weight.grad_fn


def assert_gradients(tuned: ff.SparseTuning) -> None:
    """Compare a backward with a plain model of the same weights."""
    plain = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).to(tuned.model[0].bias.dtype)
    plain.load_state_dict(tuned.model.state_dict())
    plain[0].weight.data = tuned.model[0]._parameters["weight"].detach().clone()  # its strides, too
    x = X.to(plain[0].bias.dtype)
    for model in (plain, tuned.model):
        model.zero_grad()
        model(x).square().sum().backward()
    expected = dict(plain.named_parameters())
    for name, values in tuned.named_parameters():
        name = name.removesuffix("_values")
        dense = expected[name].grad.flatten()[tuned.mask[name].long()]
        assert same_bits(values.grad, dense.float()), name


def test_tap_is_made_once(tuned: ff.SparseTuning) -> None:
    assert_gradients(tuned)
    first = node(tuned)
    optimizer = ff.AdamW(tuned.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.step()
        assert_gradients(tuned)
        assert node(tuned) is first


def replaced_data(layer: nn.Linear) -> None:
    layer._parameters["weight"].data = numbers(6, 6, seed=5)


def transposed_data(layer: nn.Linear) -> None:
    """The same address, dtype, shape and version."""
    weight = layer._parameters["weight"]
    weight.data = weight.data.t()


def written_in_grad_mode(layer: nn.Linear) -> None:
    layer.weight.mul_(2)


def asked_to_retain_its_gradient(layer: nn.Linear) -> None:
    layer.weight.retain_grad()


def moved(layer: nn.Linear) -> None:
    layer.double().float()


def loaded(layer: nn.Linear) -> None:
    state = {name: 2 * t for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "change",
    [replaced_data, transposed_data, written_in_grad_mode, asked_to_retain_its_gradient, moved,
     loaded],
)  # fmt: skip
def test_another_tap_after(change: Callable[[nn.Linear], None], tuned: ff.SparseTuning) -> None:
    assert_gradients(tuned)
    before = node(tuned)
    change(tuned.model[0])
    assert_gradients(tuned)
    assert node(tuned) is not before
    after = node(tuned)
    assert_gradients(tuned)
    assert node(tuned) is after


def test_frozen_values_and_back(tuned: ff.SparseTuning) -> None:
    assert_gradients(tuned)
    values = tuned.model[0].weight_values
    values.requires_grad_(False)
    assert not tuned.model[0].weight.requires_grad
    values.requires_grad_(True)
    assert_gradients(tuned)


def test_swapped_tensors(tuned: ff.SparseTuning) -> None:
    """Torch refuses to swap a parameter that a node holds."""
    assert_gradients(tuned)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        tuned.model.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert tuned.model[0]._parameters["weight"].dtype == torch.bfloat16
    assert_gradients(tuned)


def test_two_backwards_through_one_graph(tuned: ff.SparseTuning) -> None:
    out = tuned.model(X).square().sum()
    out.backward(retain_graph=True)
    once = [p.grad.clone() for p in tuned.parameters()]
    out.backward()
    assert all(
        same_bits(p.grad, 2 * grad) for p, grad in zip(tuned.parameters(), once, strict=True)
    )


def test_hook_on_the_weight_changes_the_gradient(tuned: ff.SparseTuning) -> None:
    assert_gradients(tuned)
    once = tuned.model[0].weight_values.grad.clone()
    handle = tuned.model[0].weight.register_hook(lambda grad: 2 * grad)
    tuned.model.zero_grad()
    tuned.model(X).square().sum().backward()
    assert same_bits(tuned.model[0].weight_values.grad, 2 * once)
    handle.remove()
    assert_gradients(tuned)


def test_no_copy_shares_a_tap(tuned: ff.SparseTuning) -> None:
    assert_gradients(tuned)
    other = copy.deepcopy(tuned)
    assert_gradients(other)
    assert node(other) is not node(tuned)


def test_release_drops_it(tuned: ff.SparseTuning) -> None:
    assert_gradients(tuned)
    target = tuned.model[0].weight_values.target
    tuned.release()
    assert target.tap is None


@pytest.mark.parametrize("steps", [1, 3])
def test_a_model_with_taps_is_freed(steps: int) -> None:
    """The tap and its compact parameter hold each other where the collector cannot look."""
    model = nn.Linear(6, 6)
    tuned = ff.train_only(model, mask_over_all(model))
    for _ in range(steps):
        model(X).sum().backward()
    dead = [weakref.ref(model), *map(weakref.ref, tuned.parameters())]
    del model, tuned
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)


def test_a_collection_within_a_pass_changes_nothing(tuned: ff.SparseTuning) -> None:
    out = tuned.model(X).square().sum()
    gc.collect()
    out.backward()
    found = [p.grad.clone() for p in tuned.parameters()]
    assert_gradients(tuned)
    for p, grad in zip(tuned.parameters(), found, strict=True):
        assert same_bits(p.grad, grad)


class Shared(nn.Module):
    """One layer that is called in turn, as ALBERT's are."""

    def __init__(self, width: int, calls: int) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(width, width), calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.layer(x).tanh()
        return x


@pytest.fixture
def peak_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], int]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import harness

    return lambda run: harness.peak_bytes(run, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["30 layers", "one layer, 30 calls"])
def test_one_dense_gradient_lives_at_a_time(
    kind: str, peak_bytes: Callable[[Callable[[], None]], int]
) -> None:
    """Autograd runs a tap at once, and not after all that was made later."""
    width = 768
    dense = 4 * width**2
    assert dense > weight_tap._SMALL
    layers = [m for _ in range(30) for m in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers) if kind == "30 layers" else Shared(width, 30)
    tuned = ff.train_only(model, ff.random_mask(model, density=0.005, seed=0))
    x = numbers(2, width)
    for _ in range(4):
        loss = model(x).square().sum()
        peak = peak_bytes(loss.backward)
        # One is made while the last one's entries are picked.
        assert dense <= peak < 2.5 * dense, peak / dense
        for p in tuned.parameters():
            p.grad = None


def test_no_dense_gradient_above_the_limit(peak_bytes: Callable[[Callable[[], None]], int]) -> None:
    width = 768
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
    tuned = ff.train_only(
        model, ff.random_mask(model, density=0.005, seed=0), dense_gradient_limit=4 * width**2 - 1
    )
    assert "dense" not in tuned.report().replace("% of the dense product", "").split("bias")[0]
    loss = model(numbers(2, width)).square().sum()
    assert peak_bytes(loss.backward) < 4 * width**2 / 2


def test_the_limit_stays() -> None:
    model = nn.Linear(6, 6)
    tuned = ff.train_only(model, mask_over_all(model), dense_gradient_limit=0)
    with tuned.released() as plain:
        mask = ff.random_mask(plain, k=5, seed=1)
    tuned.remask(mask)
    for handle in (tuned, copy.deepcopy(tuned)):
        assert handle.dense_gradient_limit == 0
        assert all(p.target.dense_gradient_limit == 0 for p in handle.parameters())
        assert "sums of masked entries" in handle.report() or "products" in handle.report()


@pytest.mark.parametrize(
    ("limit", "error", "text"),
    [
        (-1, ValueError, "dense_gradient_limit must be at least 0; got -1"),
        (1e6, TypeError, "dense_gradient_limit must be an integer, in bytes; got float"),
        (True, TypeError, "dense_gradient_limit must be an integer, in bytes; got bool"),
    ],
)
def test_a_limit_that_is_refused(limit: object, error: type[Exception], text: str) -> None:
    model = nn.Linear(6, 6)
    with pytest.raises(error, match=text):
        ff.train_only(model, mask_over_all(model), dense_gradient_limit=limit)
    assert type(model) is nn.Linear


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(6)), nn.Linear(6, 6)

    def forward(self, x):  # no annotation: torch could not pickle the traced module
        return self.layer(x) * self.scale


def test_symbolic_trace_of_a_read_weight_is_refused() -> None:
    model = Scaled()
    ff.train_only(model, mask_over_all(model))
    with pytest.raises(RuntimeError, match="trace the plain model, then call train_only"):
        torch.fx.symbolic_trace(model)
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(model)
    assert same_bits(traced(X), model(X))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_by_torch])
def test_a_traced_module_is_tuned_copied_and_compiled_anew(copied: Callable[[Any], Any]) -> None:
    plain = Scaled()
    model = torch.fx.symbolic_trace(plain)
    tuned = ff.train_only(model, mask_over_all(plain))
    for _ in range(2):
        model(X).sum().backward()
    found = {name: p.grad.clone() for name, p in tuned.named_parameters()}
    other = copied(model)
    other.recompile()
    for _ in range(2):
        other(X).sum().backward()
    grads = {n: p.grad for n, p in other.named_parameters() if n.endswith("_values")}
    assert all(same_bits(grads[name], grad) for name, grad in found.items())
    assert same_bits(other(X), model(X))
    assert other.scale_values.target.owners[0][0] is other
    with torch.no_grad():
        other.scale_values.mul_(2)
    assert not torch.equal(other(X), model(X))


def test_jit_script_is_refused(tuned: ff.SparseTuning) -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.script needs plain modules; '0\.weight'"):
        torch.jit.script(tuned.model)
    with tuned.released() as plain:
        assert same_bits(torch.jit.script(plain)(X), plain(X))
