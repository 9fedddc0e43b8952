"""A kept step has the bits of a checked one, whatever happened between the two.

An earlier way to keep checks broke in eight ways, one of them a write into memory that
share_memory_() had freed. Each change here is done to two equal models; one of them checks every
step in full.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from twins import MAKERS, Twin, assert_equal, both, counted_steps, step_both, twins

import fishfast as ff
from fishfast.optim import kept_step

pytestmark = pytest.mark.skipif(
    ff.build_info()["operations"]["sparse_adam"]["cpu"] != "cpu", reason="needs the extension"
)
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def _state(twin: Twin, position: int = 0) -> dict[str, Any]:
    return twin.optimizer.state[twin.parameters()[position]]


_MEMORY: dict[int, np.ndarray] = {}


def _at_one_address(twin: Twin) -> None:
    """Give a weight another storage at the same address, as an allocator may, and other values."""
    first = id(twin) not in _MEMORY
    memory = _MEMORY.setdefault(id(twin), np.zeros((6, 6), np.float32))
    memory[:] = np.arange(36).reshape(6, 6) if first else memory * 2 + 1
    twin.weight("square.weight").data = torch.from_numpy(memory)


def _each_state(twin: Twin, change: Callable[[Tensor], Tensor | None]) -> None:
    """Replace each state tensor by what ``change`` returns, if it returns one."""
    for state in twin.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and (new := change(value)) is not None:
                state[name] = new


def _set(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


def _assign(twin: Twin) -> None:
    state = {name: value.clone() for name, value in twin.model.state_dict().items()}
    state["again.weight"] = state["tied.weight"]
    twin.model.load_state_dict(state, assign=True)
    twin.model.again.weight = twin.model.tied._parameters["weight"]


def _reload(twin: Twin) -> None:
    twin.optimizer.load_state_dict(copy.deepcopy(twin.optimizer.state_dict()))


def _torch_saved(twin: Twin) -> None:
    file = io.BytesIO()
    torch.save(twin.optimizer.state_dict(), file)
    file.seek(0)
    twin.optimizer.load_state_dict(torch.load(file))


def _untrained_group(twin: Twin) -> None:
    twin.optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4))], "lr": 0.5})


def _shrink_mask(twin: Twin) -> None:
    fewer = {name: found[::2] for name, found in twin.tuned.mask.items()}
    twin.tuned.remask(ff.SparseMask(fewer, twin.tuned.mask.shapes), optimizer=twin.optimizer)


def _to_bf16(twin: Twin) -> None:
    # What is trained densely is so in fp32 only.
    _without(twin, twin.model.square.bias)
    twin.model.bfloat16()


def _without(twin: Twin, parameter: Tensor) -> None:
    group = twin.optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not parameter]


def _released(twin: Twin) -> None:
    with twin.tuned.released():
        pass


def _swap(twin: Twin) -> None:
    values = twin.compact("square.weight")
    twin.optimizer.param_groups[0]["params"].remove(values)
    twin.optimizer.param_groups[0]["params"].append(values)


_CHANGES: dict[str, Callable[[Twin], object]] = {
    # Where tensors are.
    "values shared": lambda t: t.compact("square.weight").share_memory_(),
    "a plain parameter shared": lambda t: t.model.square.bias.share_memory_(),
    "weight shared": lambda t: t.weight("square.weight").share_memory_(),
    "tied weight shared": lambda t: t.weight("tied.weight").share_memory_(),
    "model shared": lambda t: t.model.share_memory(),
    "state shared": lambda t: _each_state(t, Tensor.share_memory_),
    "state moved": lambda t: _each_state(t, lambda s: _set(s, s.clone() + 1)),
    "values' data": lambda t: _set(t.compact("square.weight"), torch.randn(12)),
    "a plain parameter's data": lambda t: _set(t.model.square.bias, torch.randn(6)),
    "weight's data": lambda t: _set(t.weight("square.weight"), torch.randn(6, 6)),
    "weight's data, transposed": lambda t: _set(
        t.weight("square.weight"), t.weight("square.weight").data.t()
    ),
    "weight's dtype": lambda t: _set(
        t.weight("low.weight"), t.weight("low.weight").data.view(torch.float16)
    ),
    "weights replaced": _assign,
    # What was written.
    "weight written": lambda t: t.weight("low.weight").mul_(1.5),
    "weight reset": lambda t: nn.init.normal_(t.weight("tied.weight")),
    "values written": lambda t: t.compact("conv.weight").add_(1.0),
    "both written": lambda t: (t.compact("conv.weight").add_(1), t.weight("conv.weight").mul_(2)),
    "model loaded": lambda t: t.model.load_state_dict(
        {name: value * 2 for name, value in t.model.state_dict().items()}
    ),
    # The optimizer's state.
    "state replaced": lambda t: _each_state(t, lambda s: s * 0.5 if s.dim() else None),
    "state of one dropped": lambda t: t.optimizer.state.pop(t.parameters()[1]),
    "state cleared": lambda t: t.optimizer.state.clear(),
    "state by a new dict": lambda t: t.optimizer.state.__setitem__(
        t.parameters()[0], {k: v.clone() for k, v in _state(t).items()}
    ),
    "state by a user's entry": lambda t: _state(t).update(note="mine", extra=torch.ones(3)),
    "step counts set": lambda t: _each_state(t, lambda s: s + 5 if not s.dim() else None),
    "step counts written": lambda t: _each_state(t, lambda s: None if s.dim() else s.add_(5)),
    "state loaded": _reload,
    "state from a file": _torch_saved,
    # The groups.
    "a new group": _untrained_group,
    "a parameter gone": lambda t: t.optimizer.param_groups[0]["params"].pop(0),
    "another order": _swap,
    "groups copied": lambda t: setattr(
        t.optimizer, "param_groups", [{**g, "lr": 0.3} for g in t.optimizer.param_groups]
    ),
    "lr": lambda t: t.optimizer.param_groups[0].update(lr=0.5),
    "lr by a tensor": lambda t: t.optimizer.param_groups[0].update(lr=torch.tensor(0.5)),
    "maximize": lambda t: t.optimizer.param_groups[0].update(maximize=True),
    "weight decay": lambda t: t.optimizer.param_groups[0].update(weight_decay=0.3),
    "momentum and amsgrad": lambda t: t.optimizer.param_groups[0].update(
        momentum=0.0 if t.optimizer.param_groups[0].get("momentum") else 0.5,
        amsgrad=not t.optimizer.param_groups[0].get("amsgrad"),
    ),
    # The model.
    "bf16": _to_bf16,
    "remask": _shrink_mask,
    "released for a while": _released,
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
@every_optimizer
def test_a_kept_step_after_a_change_has_the_bits_of_a_checked_one(
    make: Any, change: Callable[[Twin], object]
) -> None:
    pair = twins(make)
    both(pair, change)
    with counted_steps() as count:
        step_both(pair, 3)
    assert count["kept"] >= 2  # from the second one on it is kept again


@every_optimizer
def test_another_storage_at_the_same_address_is_noticed(make: Any) -> None:
    pair = twins(make)
    for _ in range(3):
        both(pair, _at_one_address)
        step_both(pair, 3)
    _MEMORY.clear()


@every_optimizer
def test_steps_that_nothing_happened_before_are_kept(make: Any) -> None:
    pair = twins(make)
    with counted_steps() as count:
        step_both(pair, 4)
    assert count == {"checked": 4, "kept": 4}


@pytest.mark.parametrize("unusual", ["absent", "not contiguous"])
@every_optimizer
def test_gradients_that_come_and_go(make: Any, unusual: str) -> None:
    pair = twins(make)

    def prepare(skipped: Callable[[int], bool]) -> Callable[[Twin], None]:
        def change(twin: Twin) -> None:
            for position, parameter in enumerate(twin.parameters()):
                if skipped(position):
                    wide = torch.randn(*parameter.shape, 2)
                    parameter.grad = None if unusual == "absent" else wide[..., 0]

        return change

    with counted_steps() as count:
        for turn in range(6):
            step_both(pair, 1, prepare(lambda position, turn=turn: position % 3 == turn % 3))
        step_both(pair, 6)
        step_both(pair, 1, prepare(lambda position: True))
        step_both(pair, 1)
    # A parameter may miss a step, and its count stays behind; an unusual gradient is checked.
    assert count["kept"] >= (12 if unusual == "absent" else 4)


@every_optimizer
def test_experts_that_take_turns_are_kept(make: Any) -> None:
    pair = twins(make)
    both(pair, lambda twin: twin.optimizer.param_groups[0].update(lr=0.1))

    def one_half(turn: int) -> Callable[[Twin], None]:
        def change(twin: Twin) -> None:
            for position, parameter in enumerate(twin.parameters()):
                if position % 2 == turn % 2:
                    parameter.grad = None

        return change

    for twin in pair:
        twin.optimizer._kept = None
    with counted_steps() as count:
        for turn in range(6):
            step_both(pair, 1, one_half(turn))
    assert count["kept"] == 5


@every_optimizer
def test_a_first_gradient_later_than_the_others(make: Any) -> None:
    pair = Twin(make), Twin(make)

    def without_the_last(twin: Twin) -> None:
        twin.parameters()[-1].grad = None

    with counted_steps() as count:
        step_both(pair, 3, without_the_last)
        assert count["kept"] == 2
        step_both(pair, 3)
    assert count["kept"] == 4


_BAD_GRADIENTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    # torch's setter refuses the first two, unless they come past it.
    "wrong size": (lambda p: _set(p.grad, torch.randn(3)), "must have their parameter's shape"),
    "half": (lambda p: _set(p.grad, p.grad.half()), "gradients must be dense float32"),
    "sparse": (lambda p: setattr(p, "grad", p.grad.to_sparse()), "must be dense float32"),
}


@pytest.mark.parametrize(("spoil", "message"), _BAD_GRADIENTS.values(), ids=_BAD_GRADIENTS)
@every_optimizer
def test_a_gradient_that_no_step_can_take_is_refused_as_ever(
    make: Any, spoil: Callable[[Tensor], object], message: str
) -> None:
    twin = twins(make)[0]
    before = {name: value.detach().clone() for name, value in twin.tensors().items()}
    spoil(twin.compact("conv.weight"))
    with pytest.raises(RuntimeError, match=message):
        twin.optimizer.step()
    assert all(torch.equal(before[n], value.detach()) for n, value in twin.tensors().items())


def _untie(twin: Twin) -> None:
    twin.model.again.weight = nn.Parameter(torch.randn(3, 5))


_REFUSED: dict[str, tuple[Callable[[Twin], object], str]] = {
    "reshaped": (
        lambda t: _set(t.weight("square.weight"), t.weight("square.weight").data.view(4, 9)),
        "had shape",
    ),
    "cut": (
        lambda t: _set(t.weight("square.weight"), t.weight("square.weight").data[:3]),
        "had shape",
    ),
    "untied": (_untie, "was untied after train_only"),
    "another dtype": (lambda t: t.weight("conv.weight").data.double(), ""),
    "released": (lambda t: t.tuned.release(), "does not train any more"),
    "lr": (lambda t: t.optimizer.param_groups[0].update(lr="0.1"), "lr must be a number"),
    "state cut": (
        lambda t: _state(t).update({n: v[:1] for n, v in _state(t).items() if v.dim()}),
        "state must be contiguous float32",
    ),
    "state in half": (
        lambda t: _state(t).update({n: v.half() for n, v in _state(t).items() if v.dim()}),
        "state must be contiguous float32",
    ),
}


@pytest.mark.parametrize(("change", "message"), _REFUSED.values(), ids=_REFUSED)
def test_what_is_refused_is_refused_after_kept_steps(
    change: Callable[[Twin], object], message: str
) -> None:
    pair = twins(MAKERS["AdamW"])
    both(pair, change)
    if not message:
        step_both(pair, 1)
        return
    errors = []
    for twin in pair:
        twin.optimizer._kept = twin.optimizer._kept if twin is pair[0] else None
        with pytest.raises((RuntimeError, ValueError), match=message) as caught:
            twin.optimizer.step()
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@every_optimizer
def test_overflow_and_loss_scale(make: Any) -> None:
    pair = twins(make)

    def scaled(overflow: float) -> Callable[[Twin], None]:
        def change(twin: Twin) -> None:
            twin.optimizer.found_inf = torch.tensor(overflow)
            twin.optimizer.grad_scale = torch.tensor(4.0)

        return change

    with counted_steps() as count:
        step_both(pair, 2, scaled(0.0))
        step_both(pair, 2, scaled(1.0))
        step_both(pair, 2, scaled(0.0))
    assert count == {"checked": 4, "kept": 4}  # none of both in an overflow


@every_optimizer
def test_check_finite_looks_at_every_gradient(make: Any) -> None:
    twin = Twin(make)
    twin.optimizer._check_finite = True
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter.detach())
    twin.optimizer.step()
    twin.optimizer.step()
    twin.parameters()[0].grad[0] = float("nan")
    with pytest.raises(RuntimeError, match="gradients must be finite"):
        twin.optimizer.step()


@every_optimizer
def test_two_optimizers_over_the_same_parameters(make: Any) -> None:
    pair = twins(make)
    others = [make(twin.parameters()) for twin in pair]
    with counted_steps() as count:
        for _ in range(4):
            for position, other in enumerate(others):
                other._kept = other._kept if position == 0 else None
                other.step()
            step_both(pair, 1)
    assert count["kept"] == 7  # of the second one the first is checked, of course


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@every_optimizer
def test_a_copy_and_its_original_step_apart(make: Any, way: str) -> None:
    pair = twins(make)

    def copied(twin: Twin) -> Twin:
        if way == "deepcopy":
            return copy.deepcopy(twin)
        file = io.BytesIO()
        torch.save(twin, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    twin_copies = copied(pair[0]), copied(pair[1])
    step_both(twin_copies, 3)
    step_both(pair, 3)
    assert_equal((pair[0], twin_copies[1]))


def test_a_saved_tensor_is_no_larger_than_itself() -> None:
    twin = twins(MAKERS["AdamW"])[0]
    for state in twin.optimizer.state_dict()["state"].values():
        for name, value in state.items():
            assert value.untyped_storage().nbytes() == 4 * value.numel(), name


def test_new_state_has_version_counters_of_its_own() -> None:
    twin = twins(MAKERS["AdamW"])[0]
    first, second = _state(twin, 0)["exp_avg"], _state(twin, 1)["exp_avg"]
    version = second._version
    first.add_(1)
    assert second._version == version


def test_a_backward_that_saved_a_weight_notices_the_step() -> None:
    """The step counts a version of values and weight, as an operation of torch would."""
    twin = twins(MAKERS["AdamW"])[0]
    values = twin.compact("square.weight")
    product = (values * values).sum()
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter.detach())
    with counted_steps() as count:
        twin.optimizer.step()
    assert count == {"checked": 0, "kept": 1}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_one_optimizer_in_two_threads_reads_no_freed_gradient() -> None:
    """What it computes is nobody's guess, as with torch's; but every step is one of its own."""
    twin = twins(MAKERS["AdamW"])[0]
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(50):
                for parameter in twin.parameters():
                    parameter.grad = torch.ones_like(parameter.detach())
                twin.optimizer.step()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(value.isfinite().all() for value in twin.tensors().values())


def test_steps_that_cannot_be_kept_are_seldom_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    entries = kept_step._entry
    monkeypatch.setattr(kept_step, "_entry", lambda *given: made.append(1) or entries(*given))
    twin = Twin(MAKERS["AdamW"])
    for _ in range(32):
        for parameter in twin.parameters():
            parameter.grad = torch.ones_like(parameter.detach())
        with torch.no_grad():
            twin.weight("conv.weight").add_(1.0)
        twin.optimizer.step()
    assert len(made) == 6 * len(twin.parameters())  # steps 1, 2, 4, 8, 16 and 32


def test_garbage_of_a_kept_step_is_collected() -> None:
    """A model may well hold its optimizer; the step that is kept is part of that circle."""
    import gc
    import weakref

    twin = twins(MAKERS["AdamW"])[0]
    twin.model.optimizer = twin.optimizer
    seen = weakref.ref(twin.model)
    del twin
    gc.collect()
    assert seen() is None


def test_numbers_of_a_row_are_those_of_its_group() -> None:
    pair = twins(
        lambda parameters: ff.AdamW(
            [{"params": [p], "lr": 10.0**-i, "betas": (0.5, 0.9)} for i, p in enumerate(parameters)]
        )
    )
    with counted_steps() as count:
        step_both(pair, 2)
    assert count["kept"] == 2
    rates = [group["lr"] for group in pair[0].optimizer.param_groups]
    assert len(np.unique(rates)) == len(rates) == 5
