"""Another mask in the middle of training, against dense torch with the moments edited by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import (
    TORCH_HAS_FMA,
    CorrectSqrt,
    Weights,
    assert_state,
    gradients_over_time,
    mask_of,
    random_tensors,
    same_bits,
    some_indices,
    state_of,
)
from torch import Tensor, nn
from train_only_modules import TiedNet, mask_over_all
from train_only_net import assert_masters_match, net, train

import fishfast as ff

LR = 0.05
SHAPES = [(40, 30), (23,), (7, 11), (5, 5)]
# Of each tensor: overlapping, entering whole, leaving whole, replaced by others altogether.
FIRST = [some_indices(1200, seed=1), None, some_indices(77, seed=2), torch.tensor([0, 3]).int()]
SECOND = [some_indices(1200, seed=3), some_indices(23, seed=4), None, torch.tensor([1, 4]).int()]


def masks(model: nn.Module) -> list[ff.SparseMask]:
    return [
        mask_of(model, {f"w{i}": found for i, found in enumerate(chosen) if found is not None})
        for chosen in (FIRST, SECOND)
    ]


def dense_run(on_leave: str, weights: list[Tensor], series: list[list[Tensor]]) -> Any:
    """Three phases of dense torch.optim.AdamW: first mask, second, first again."""
    model = Weights(*weights)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, foreach=False)
    before: list[Tensor] | None = None
    with CorrectSqrt():
        for phase, chosen in enumerate((FIRST, SECOND, FIRST)):
            inside = []
            for weight, found in zip(weights, chosen, strict=True):
                bits = torch.zeros(weight.numel(), dtype=torch.bool)
                if found is not None:
                    bits[found.long()] = True
                inside.append(bits.view(weight.shape))
            for p, now, was, base in zip(
                parameters, inside, before or inside, weights, strict=True
            ):
                state = optimizer.state.get(p)
                if state and bool((now & was).any()):
                    state["exp_avg"] *= now & was
                    state["exp_avg_sq"] *= now & was
                else:
                    optimizer.state.pop(p, None)
                if on_leave == "restore":
                    p.data = torch.where(was & ~now, base, p.data)
            for grads in series[3 * phase : 3 * phase + 3]:
                for p, now, grad in zip(parameters, inside, grads, strict=True):
                    p.grad = grad * now if bool(now.any()) else None
                optimizer.step()
            before = inside
    return model, optimizer, before


@pytest.mark.skipif(not TORCH_HAS_FMA, reason="torch rounds twice where we round once")
@pytest.mark.parametrize("on_leave", ["keep", "restore"])
@pytest.mark.parametrize("backend", ["cpu", "torch", "attached"])
def test_three_phases_equal_dense_torch_bit_for_bit(backend: str, on_leave: str) -> None:
    weights = random_tensors(*SHAPES)
    series = gradients_over_time(weights, 9)
    expected, dense, inside = dense_run(on_leave, weights, series)

    tuned = ff.train_only(Weights(*weights), masks(Weights(*weights))[0])
    if backend == "attached":
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=LR, weight_decay=0.0, foreach=False)
        tuned.attach(optimizer)
    else:
        optimizer = ff.AdamW(tuned.parameters(), lr=LR, backend=backend)
    first, second = masks(Weights(*weights))
    with CorrectSqrt():
        for phase, mask in enumerate((first, second, first)):
            if phase:
                tuned.remask(mask, on_leave, optimizer=optimizer)
                assert tuned.mask == mask
            for grads in series[3 * phase : 3 * phase + 3]:
                for name, values in tuned.named_parameters():
                    name = name.removesuffix("_values")
                    grad = grads[int(name.removeprefix("w"))]
                    values.grad = grad.flatten()[tuned.mask[name].long()]
                optimizer.step()
    assert_state(tuned.model, expected.state_dict())
    theirs = dict(expected.named_parameters())
    assert len(optimizer.state) == len(list(tuned.parameters())) == 3
    for name, values in tuned.named_parameters():
        weight = theirs[name.removesuffix("_values")]
        chosen = inside[int(name[1])]
        assert same_bits(values, weight[chosen])
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(optimizer.state[values][key], dense.state[weight][key][chosen]), name
        assert optimizer.state[values]["step"] == dense.state[weight]["step"]


def other_mask(model: nn.Module, seed: int = 11, density: float = 0.3) -> ff.SparseMask:
    return ff.random_mask(model, density=density, seed=seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_of_weights_that_stay_keep_their_bits(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    tuned = ff.train_only(model, other_mask(model, seed=1))
    optimizer = ff.AdamW(tuned.parameters(), lr=1e-5)
    train(model, optimizer, 5)
    before, old = state_of(model), tuned.mask
    masters = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    tuned.remask(other_mask_of_plain(tuned, seed=2), optimizer=optimizer)
    assert_state(model, before)
    assert_masters_match(model)
    kept_bits = 0
    for name, parameter in tuned.named_parameters():
        weight = name.removesuffix("_values")
        theirs = dict(zip(old[weight].tolist(), masters.get(name, ()), strict=True))
        for index, value in zip(tuned.mask[weight].tolist(), parameter.detach(), strict=True):
            if index in theirs:
                assert same_bits(value, theirs[index])
                kept_bits += bool(value != value.to(dtype).float())
    assert kept_bits > 5  # some masters were between two weights, or this shows nothing


def other_mask_of_plain(tuned: ff.SparseTuning, seed: int) -> ff.SparseMask:
    with tuned.released() as plain:
        return other_mask(plain, seed)


@pytest.mark.parametrize("on_leave", ["keep", "restore"])
def test_delta_holds_the_union_and_is_exact(on_leave: str, tmp_path: Path) -> None:
    """With buffers that training changed, and a tied weight."""
    base = net()
    pristine = state_of(base)
    model = net()
    tuned = ff.train_only(model, other_mask(model, seed=0))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1, momentum=0.9)
    selected: set[tuple[str, int]] = set()
    for seed in range(3):
        if seed:
            tuned.remask(other_mask_of_plain(tuned, seed), on_leave, optimizer=optimizer)
        selected |= {(name, i) for name, found in tuned.mask.items() for i in found.tolist()}
        train(model, optimizer, 3)
    assert ff.save_delta(tuned, tmp_path / "d") == len(selected) > tuned.num_selected
    assert tuned.trained_mask.num_selected == len(selected)
    assert f"a delta holds {len(selected):,}, the union" in tuned.report()
    delta = ff.load_delta(tmp_path / "d")
    assert delta.num_selected == len(selected)
    delta.apply_(base)
    assert_state(base, state_of(model))
    delta.revert_(base)
    assert_state(base, pristine)
    if on_leave == "restore":  # whatever is not in the present mask is the base's
        for name, parameter in base.named_parameters():
            left = torch.ones(parameter.numel(), dtype=torch.bool)
            left[tuned.mask[name].long()] = False
            now = model.state_dict()[name].flatten()[left]
            assert same_bits(now, parameter.detach().flatten()[left]), name
    tuned.release()
    assert_state(model, state_of(tuned.model))
    assert not any(name.endswith("_values") for name, _ in model.named_parameters())


@pytest.mark.parametrize("make", ["AdamW", "attached"])
def test_an_optimizer_that_was_not_passed_refuses_to_step(make: str) -> None:
    tuned = ff.train_only(net(), other_mask(net()))
    if make == "AdamW":
        optimizer: Any = ff.AdamW(tuned.parameters())
    else:
        optimizer = torch.optim.AdamW(tuned.parameters())
        tuned.attach(optimizer)
    train(tuned.model, optimizer)
    tuned.remask(other_mask_of_plain(tuned, 5))
    before = state_of(tuned.model)
    for zero in (False, True):  # also without any gradient
        if zero:
            optimizer.zero_grad()
        with pytest.raises(
            RuntimeError, match=r"from before tuned\.remask; pass remask optimizer="
        ):
            optimizer.step()
    assert_state(tuned.model, before)
    with pytest.raises(ValueError, match="optimizer must hold compact parameters of this model"):
        tuned.remask(tuned.mask, optimizer=optimizer)
    train(tuned.model, ff.AdamW(tuned.parameters()))
    assert not same_bits(tuned.model.state_dict()["conv.weight"], before["conv.weight"])


def test_param_groups_and_schedulers_go_on() -> None:
    """The new tensors join the group that they are sent to; order is the model's."""
    model = Weights(*random_tensors(*SHAPES))
    first, second = masks(model)
    tuned = ff.train_only(model, first)
    values = dict(tuned.named_parameters())
    optimizer = ff.AdamW(
        [
            {"params": [values["w3_values"]], "lr": 0.5},
            {"params": [values["w2_values"], values["w0_values"]]},
        ],
        lr=1.0,
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.raises(ValueError, match=r"which param group 'w1' joins, since groups \[0, 1\]"):
        tuned.remask(second, optimizer=optimizer)
    with pytest.raises(ValueError, match="must return an index below 2; got 2 for 'w1'"):
        tuned.remask(second, optimizer=optimizer, param_group=lambda name: 2)
    assert tuned.mask == first
    tuned.remask(second, optimizer=optimizer, param_group=lambda name: 1)
    values = dict(tuned.named_parameters())
    for group, expected in zip(optimizer.param_groups, (["w3"], ["w0", "w1"]), strict=True):
        assert [id(p) for p in group["params"]] == [id(values[f"{n}_values"]) for n in expected]
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]


def test_resuming_after_a_remask_equals_not_having_stopped() -> None:
    def start() -> tuple[ff.SparseTuning, list[ff.SparseMask]]:
        model = net().bfloat16()
        chosen = [other_mask(model, seed) for seed in (1, 2)]
        return ff.train_only(model, chosen[0]), chosen

    tuned, chosen = start()
    optimizer = ff.AdamW(tuned.parameters(), lr=1e-4)
    train(tuned.model, optimizer, 3)
    tuned.remask(chosen[1], "restore", optimizer=optimizer)
    train(tuned.model, optimizer, 3)
    saved = copy.deepcopy((tuned.model.state_dict(), optimizer.state_dict()))
    train(tuned.model, optimizer, 3)

    again, chosen = start()
    again.remask(chosen[1])
    resumed = ff.AdamW(again.parameters(), lr=1e-4)
    again.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again.model, resumed, 3)
    assert_state(again.model, state_of(tuned.model))
    for mine, other in zip(again.parameters(), tuned.parameters(), strict=True):
        assert same_bits(mine, other)
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(resumed.state[mine][key], optimizer.state[other][key])
    assert again.trained_mask == tuned.trained_mask
    assert again.base == tuned.base


def test_tied_weight() -> None:
    model = TiedNet()
    tuned = ff.train_only(model, mask_over_all(model))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    tuned.remask(other_mask_of_plain(tuned, 3), optimizer=optimizer)
    (values,) = tuned.parameters()
    assert model.head._parameters["weight_values"] is values
    model(torch.arange(11)).square().sum().backward()
    before = model.state_dict()["embed.weight"].clone()
    optimizer.step()
    changed = (model.state_dict()["embed.weight"] != before).flatten().nonzero().flatten()
    assert changed.tolist() == tuned.mask["embed.weight"].tolist()


def test_released_lends_the_plain_model_for_scores() -> None:
    model = net().eval()
    plain = [name for name, _ in model.named_parameters()]
    tuned = ff.train_only(model, other_mask(model))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    train(model, optimizer)
    parameters, before = list(tuned.parameters()), state_of(model)
    with tuned.released() as lent:
        assert [name for name, _ in lent.named_parameters()] == plain
        fisher = ff.estimate_fisher(
            lent, [torch.randn(4, 3, 6, 6)], loss_fn=lambda m, x: m(x).square().sum(1)
        )
        with pytest.raises(RuntimeError, match="has no mask now; leave the released"):
            tuned.remask(tuned.mask)
    assert set(fisher) == set(plain)
    assert all(a is b for a, b in zip(tuned.parameters(), parameters, strict=True))
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in plain)
    with pytest.raises(ValueError, match="inside"), tuned.released():
        raise ValueError("inside")
    assert_state(model, before)
    tuned.remask(ff.top_k_mask(fisher, k=40), optimizer=optimizer)
    train(model, optimizer)
    assert_masters_match(model)


class Final(nn.Linear):
    def __init_subclass__(cls, **options: Any) -> None:
        raise TypeError("Final cannot be derived from")


def refusals() -> list[Any]:
    def unfit(tuned: ff.SparseTuning) -> ff.SparseMask:
        return ff.SparseMask({"x": torch.tensor([0])}, {"x": (3,)})

    def compact(tuned: ff.SparseTuning) -> ff.SparseMask:
        return ff.SparseMask(
            {"0.weight_values": torch.tensor([0])},
            {"0.weight_values": (tuned.mask["0.weight"].numel(),)},
        )

    def of_final(tuned: ff.SparseTuning) -> ff.SparseMask:
        return ff.SparseMask({"2.bias": torch.tensor([0])}, {"2.bias": (3,)})

    def empty(tuned: ff.SparseTuning) -> ff.SparseMask:
        return ff.SparseMask({}, tuned.mask.shapes)

    return [
        pytest.param(lambda t: {"a": 1}, {}, TypeError, "mask must be a SparseMask", id="no mask"),
        pytest.param(unfit, {}, ValueError, "names 'x', which the model does not", id="unfit"),
        pytest.param(empty, {}, ValueError, "at least one weight; got an empty mask", id="empty"),
        pytest.param(compact, {}, ValueError, "'0.weight_values' holds the trained", id="compact"),
        pytest.param(of_final, {}, TypeError, "Final cannot be derived from", id="final class"),
        pytest.param(
            lambda t: t.mask, {"on_leave": "drop"}, ValueError,
            "on_leave must be 'keep' or 'restore'; got 'drop'", id="on_leave",
        ),
        pytest.param(
            lambda t: t.mask, {"optimizer": 3}, TypeError, "must be a torch optimizer; got int",
            id="no optimizer",
        ),
        pytest.param(
            lambda t: t.mask, {"optimizer": ff.SGD(nn.Linear(2, 2).parameters(), lr=1.0)},
            ValueError, "optimizer must hold compact parameters of this model", id="another's",
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "error", "match"), refusals())
def test_refused_with_nothing_changed(make: Any, options: Any, error: Any, match: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Final(5, 3))
    tuned = ff.train_only(model, ff.random_mask(model, k=7, seed=0, exclude="2"))
    optimizer = ff.AdamW(tuned.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    before, parameters = state_of(model), list(tuned.parameters())
    handle, state = dict(vars(tuned)), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=match):
        tuned.remask(make(tuned), **{"optimizer": optimizer, **options})
    assert_state(model, before)
    assert vars(tuned) == handle
    assert all(a is b for a, b in zip(tuned.parameters(), parameters, strict=True))
    assert all(parameter.grad is not None for parameter in parameters)
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[key], state["state"][index][key]) for key in entry)
    optimizer.step()
    assert not same_bits(model.state_dict()["0.weight"], before["0.weight"])


def test_a_weight_that_changed_outside_the_masks_is_not_taken_for_the_base() -> None:
    model = net()
    tuned = ff.train_only(model, ff.random_mask(model, k=9, seed=0, exclude="free"))
    with torch.no_grad():
        model.free.bias += 1.0
    tuned.remask(tuned.mask)  # needs no base values
    with pytest.raises(RuntimeError, match="weights outside the mask changed since train_only"):
        tuned.remask(other_mask_of_plain(tuned, 1))
    tuned.rebase()
    tuned.remask(other_mask_of_plain(tuned, 1))


def test_values_that_were_not_written_are_refused() -> None:
    tuned = ff.train_only(net(), other_mask(net()))
    next(tuned.parameters()).detach().numpy()[:] += 1  # counts no version
    with pytest.raises(RuntimeError, match=r"'conv\.weight_values' were not written into the wei"):
        tuned.remask(tuned.mask)


def test_state_of_another_shape_is_refused() -> None:
    tuned = ff.train_only(net(), other_mask(net()))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    optimizer.state[next(tuned.parameters())]["rows"] = torch.zeros(3)
    with pytest.raises(ValueError, match="its 'rows' of 'conv.weight' has shape"):
        tuned.remask(tuned.mask, optimizer=optimizer)


def test_rebase_forgets_the_masks_before() -> None:
    tuned = ff.train_only(net(), other_mask(net(), seed=1))
    tuned.remask(other_mask_of_plain(tuned, 2))
    assert tuned.trained_mask != tuned.mask
    tuned.rebase()
    assert tuned.trained_mask == tuned.mask
    assert set(tuned.base_values) == {name for name, found in tuned.mask.items() if len(found)}
