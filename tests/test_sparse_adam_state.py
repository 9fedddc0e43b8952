"""State of ff.AdamW: saved and loaded mid-run, to and from torch's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from copying import through_a_file
from stepping import (
    TORCH_ADAMW,
    TORCH_HAS_FMA,
    CorrectSqrt,
    Weights,
    assert_same_history,
    gradients_over_time,
    random_tensors,
    same_bits,
    snapshot_of_ours,
    some_indices,
    steps_of_ours,
    steps_of_torch,
    tune,
)

import fishfast as ff


def as_torch(tuned: ff.SparseTuning) -> torch.optim.Optimizer:
    optimizer = TORCH_ADAMW(tuned.parameters(), lr=0.1, weight_decay=0.0)
    tuned.attach(optimizer)
    return optimizer


def as_ours(tuned: ff.SparseTuning) -> torch.optim.Optimizer:
    return ff.AdamW(tuned.parameters(), lr=0.1)


@pytest.mark.skipif(not TORCH_HAS_FMA, reason="torch has no fused multiply-add here")
@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        (as_ours, as_ours, torch.float32),
        (as_torch, as_ours, torch.float32),
        (as_ours, as_torch, torch.float32),
        (as_ours, as_ours, torch.bfloat16),
        (as_ours, as_torch, torch.bfloat16),  # not from torch: its state has no masters
    ],
    ids=["ours to ours", "torch to ours", "ours to torch", "bf16", "bf16 to torch"],
)
def test_state_reloaded_mid_run(
    first: Callable[..., Any], second: Callable[..., Any], dtype: torch.dtype, tmp_path: Any
) -> None:
    weights = [w.to(dtype) for w in random_tensors((9, 5), (17,))]
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=7)
    uninterrupted, before, after = (tune(weights, indices) for _ in range(3))
    with CorrectSqrt():
        expected = steps_of_ours(uninterrupted, as_ours(uninterrupted), series)
        optimizer = first(before)
        steps_of_ours(before, optimizer, series[:3])
        state = through_a_file(before, optimizer, tmp_path / "checkpoint.pt")
        after.model.load_state_dict(state["model"])
        resumed = second(after)
        if second is as_torch and dtype != torch.float32:  # our masters are what torch lacks
            ff.AdamW(after.parameters()).load_state_dict(state["optimizer"])
        resumed.load_state_dict(state["optimizer"])
        ours = steps_of_ours(after, resumed, series[3:])
    assert_same_history(ours, expected[3:])


@pytest.mark.skipif(not TORCH_HAS_FMA, reason="torch has no fused multiply-add here")
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_full_mask_equals_torch_through_a_save_and_a_reload(
    make: Any, weight_decay: float, backend: str, tmp_path: Any
) -> None:
    """Ours is saved and loaded into new objects in mid-run; torch's dense run never stops."""
    weights = random_tensors((31, 7), (64,))
    indices = [torch.arange(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=8)
    options = {"lr": 0.05, "weight_decay": weight_decay}
    dense = functools.partial(make, foreach=False, **options)
    expected = steps_of_torch(weights, indices, series, dense)
    ours: list[dict[str, torch.Tensor]] = []
    state: dict[str, Any] = {}
    for part in range(2):
        tuned = tune(weights, indices)
        ours_of = getattr(ff, make.__name__)
        optimizer = ours_of(tuned.parameters(), backend=backend, **options)
        if state:
            tuned.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        with CorrectSqrt():
            ours += steps_of_ours(tuned, optimizer, series[4 * part : 4 * part + 4])
        state = through_a_file(tuned, optimizer, tmp_path / "half.pt")
    assert_same_history(ours, expected)  # weights, both moments and counts after every step


def test_resuming_restores_masters_of_bf16_weights() -> None:
    # Steps far below bf16's resolution: only the masters remember them.
    weights = [torch.ones(8, dtype=torch.bfloat16)]
    series = [[torch.ones(8)] for _ in range(40)]
    straight, before, after = (tune(weights, [torch.arange(8)]) for _ in range(3))
    options = {"lr": 1e-4}
    expected = steps_of_ours(straight, ff.AdamW(straight.parameters(), **options), series)
    optimizer = ff.AdamW(before.parameters(), **options)
    steps_of_ours(before, optimizer, series[:10])
    assert same_bits(before.model.w0, weights[0])  # nothing to be seen in bf16 yet
    after.model.load_state_dict(before.model.state_dict())
    resumed = ff.AdamW(after.parameters(), **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps_of_ours(after, resumed, series[10:])
    assert not same_bits(after.model.w0, weights[0])
    assert same_bits(after.model.w0, straight.model.w0)
    assert same_bits(next(after.parameters()), next(straight.parameters()))
    assert expected


def test_masters_of_other_weights_are_not_taken_over() -> None:
    # The optimizer is resumed, the model is not: its weights count.
    weights = [w.bfloat16() for w in random_tensors((9, 5))]
    trained, fresh = (tune(weights, [torch.arange(45)]) for _ in range(2))
    optimizer = ff.AdamW(trained.parameters(), lr=0.5)
    steps_of_ours(trained, optimizer, gradients_over_time(weights, steps=3))
    resumed = ff.AdamW(fresh.parameters(), lr=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.param_groups[0]["lr"] = 0.0
    steps_of_ours(fresh, resumed, [[torch.zeros(9, 5)]])
    assert same_bits(fresh.model.w0, weights[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_before_the_first_step_loads(dtype: torch.dtype) -> None:
    weights = [w.to(dtype) for w in random_tensors((9, 5))]
    indices = [some_indices(45)]
    series = gradients_over_time(weights, steps=2)
    tuned, other = tune(weights, indices), tune(weights, indices)
    for second in (as_ours, as_torch):
        optimizer = second(other)
        optimizer.load_state_dict(as_ours(tuned).state_dict())
        assert len(steps_of_ours(other, optimizer, series)) == 2


def test_lowered_precision_state_is_loaded_as_fp32() -> None:
    # load_state_dict casts state to the parameter's dtype: fp32, for the masters are.
    weights = [w.bfloat16() for w in random_tensors((9, 5))]
    tuned = tune(weights, [some_indices(45)])
    optimizer = ff.AdamW(tuned.parameters())
    steps_of_ours(tuned, optimizer, gradients_over_time(weights, steps=2))
    other = tune(weights, [some_indices(45)])
    loaded = ff.AdamW(other.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    for before, after in zip(tuned.parameters(), other.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(optimizer.state[before][key], loaded.state[after][key])


def test_state_of_another_mask_is_refused() -> None:
    weights = random_tensors((9, 5))
    small, large = tune(weights, [torch.arange(3)]), tune(weights, [torch.arange(30)])
    optimizer = ff.AdamW(small.parameters())
    steps_of_ours(small, optimizer, gradients_over_time(weights, steps=1))
    target = ff.AdamW(large.parameters())
    with pytest.raises(ValueError, match=r"must be of the model's present mask; got .* for 'w0'"):
        target.load_state_dict(optimizer.state_dict())
    unnamed = optimizer.state_dict()  # as torch's own and an older fishfast save it
    del unnamed["param_groups"][0]["mask_fingerprints"]
    with pytest.raises(ValueError, match=r"state_dict must fit the parameters; .*exp_avg.* \(3,\)"):
        target.load_state_dict(unnamed)
    assert not target.state


def test_state_of_another_mask_of_the_same_size_is_refused() -> None:
    weights = random_tensors((9, 5), (9,))
    masks = [torch.arange(3), torch.arange(4)], [torch.arange(3), torch.tensor([0, 1, 2, 5])]
    one, other = (tune(weights, mask) for mask in masks)
    optimizer, target = (ff.AdamW(tuned.parameters()) for tuned in (one, other))
    steps_of_ours(one, optimizer, gradients_over_time(weights, steps=1))
    with pytest.raises(ValueError, match=r"must be of the model's present mask; got .* for 'w1'"):
        target.load_state_dict(optimizer.state_dict())
    assert not target.state
    attached = torch.optim.AdamW(other.parameters())
    other.attach(attached)
    with pytest.raises(ValueError, match="must be of the model's present mask"):
        attached.load_state_dict(optimizer.state_dict())
    ff.AdamW(tune(weights, masks[0]).parameters()).load_state_dict(optimizer.state_dict())


def test_masters_of_another_mask_are_refused() -> None:
    weights = [w.bfloat16() for w in random_tensors((9, 5))]
    one, many = tune(weights, [torch.arange(1)]), tune(weights, [torch.arange(30)])
    optimizer = ff.AdamW(one.parameters())
    steps_of_ours(one, optimizer, gradients_over_time(weights, steps=1))
    state = optimizer.state_dict()
    state["state"][0] = {"master": state["state"][0]["master"]}  # it would broadcast
    before = next(many.parameters()).detach().clone()
    del state["param_groups"][0]["mask_fingerprints"]
    with pytest.raises(ValueError, match="state_dict must fit the parameters; .*master"):
        ff.AdamW(many.parameters()).load_state_dict(state)
    assert same_bits(next(many.parameters()), before)


def test_state_names_are_those_of_torch() -> None:
    weights = random_tensors((9, 5))
    tuned = tune(weights, [some_indices(45)])
    optimizer = ff.AdamW(tuned.parameters())
    steps_of_ours(tuned, optimizer, gradients_over_time(weights, steps=1))
    model = Weights(*weights)
    reference = TORCH_ADAMW(model.parameters())
    model.w0.grad = torch.ones(9, 5)
    reference.step()
    assert optimizer.state_dict()["state"][0].keys() == reference.state_dict()["state"][0].keys()
    assert set(snapshot_of_ours(tuned, optimizer)) == {
        "w0", "w0.step", "w0.exp_avg", "w0.exp_avg_sq",
    }  # fmt: skip
