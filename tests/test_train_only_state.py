"""The compact parameters survive moves and loads; the state_dict is the base's."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from stepping import assert_state, same_bits, state_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils import parametrizations
from train_only_modules import mask_over_all, numbers
from train_only_net import assert_masters_match, net, train, tuned_net

import fishfast as ff


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.to("cpu"),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.share_memory(),
        lambda m: m.requires_grad_(True),
        lambda m: m.train().eval().train(),
    ],
    ids=[
        "to bf16",
        "bfloat16",
        "half",
        "float",
        "to cpu",
        "channels_last",
        "share",
        "grad",
        "mode",
    ],
)
def test_moved_model_keeps_fp32_masters_and_trains(move: Callable[[nn.Module], Any]) -> None:
    tuned = tuned_net()
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    train(tuned.model, optimizer)
    masters = [p.detach().clone() for p in tuned.parameters()]
    assert all(p.grad is not None for p in tuned.parameters())
    move(tuned.model)
    assert len(list(tuned.parameters())) == len(masters)
    for parameter, master in zip(tuned.parameters(), masters, strict=True):
        assert same_bits(parameter, master)
        assert parameter.grad.dtype == torch.float32
    assert_masters_match(tuned.model)
    train(tuned.model, optimizer)
    assert_masters_match(tuned.model)
    assert not same_bits(next(tuned.parameters()), masters[0])
    for name, found in tuned.mask.items():
        assert not len(found) or dict(tuned.model.named_parameters())[name].grad is None


def test_parameters_of_the_model() -> None:
    tuned = tuned_net()
    trainable = [p for p in tuned.model.parameters() if p.requires_grad]
    assert [id(p) for p in trainable] == [id(p) for p in tuned.parameters()]
    assert sum(p.numel() for p in trainable) == tuned.num_selected == tuned.mask.num_selected
    assert all(p.dtype == torch.float32 and p.dim() == 1 and p.is_leaf for p in trainable)
    names = [name for name, _ in tuned.named_parameters()]
    assert names == [
        "conv.weight_values", "conv.bias_values", "norm.weight_values", "norm.bias_values",
        "first.weight_values", "first.bias_values", "again.bias_values",
    ]  # fmt: skip


def test_state_dict_and_buffers_are_those_of_the_base() -> None:
    plain, tuned = net(), tuned_net()
    assert_state(tuned.model, plain.state_dict())
    assert [n for n, _ in tuned.model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert repr(tuned.model) == repr(plain)
    assert repr(tuned) == f"SparseTuning(Net, {tuned.mask!r})"


def test_strict_load_of_a_base_checkpoint_takes_the_masters_along() -> None:
    tuned = tuned_net()
    base = state_of(tuned.model)
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    train(tuned.model, optimizer)
    assert not same_bits(tuned.model.state_dict()["conv.weight"], base["conv.weight"])
    keys = tuned.model.load_state_dict(base, strict=True)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert_masters_match(tuned.model)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # no gradient: writes the masters back
    assert_state(tuned.model, base)


def test_load_of_a_wrong_checkpoint_still_fails() -> None:
    tuned = tuned_net()
    base = state_of(tuned.model)
    masters = [p.detach().clone() for p in tuned.parameters()]
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        tuned.model.load_state_dict({**base, "extra": torch.ones(1)})
    del base["conv.weight"]
    with pytest.raises(RuntimeError, match="Missing key.*conv.weight"):
        tuned.model.load_state_dict(base)
    assert all(same_bits(p, m) for p, m in zip(tuned.parameters(), masters, strict=True))


def untied_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))


def test_load_with_assign_is_noticed() -> None:
    model = untied_net()
    tuned = ff.train_only(model, mask_over_all(model))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    base = state_of(model)
    train(model, optimizer)
    model.load_state_dict({n: t.clone() for n, t in base.items()}, assign=True)
    assert_masters_match(model)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    expected = {n: t for n, t in base.items() if "running" not in n and "num_b" not in n}
    for name, tensor in expected.items():
        assert same_bits(model.state_dict()[name], tensor), name
    before = state_of(model)
    train(model, optimizer)  # the assigned tensors are the ones that are trained
    assert not same_bits(model.state_dict()["0.weight"], before["0.weight"])
    assert_masters_match(model)


def test_load_with_assign_of_a_tied_weight_is_refused_by_name() -> None:
    tuned = tuned_net()
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    train(tuned.model, optimizer)
    base = state_of(net())
    tuned.model.load_state_dict(copy.deepcopy(base), assign=True)
    with pytest.raises(
        RuntimeError, match=r"tied weight 'first\.weight' was untied after train_only"
    ):
        train(tuned.model, optimizer)
    # Tied again, it trains on from the loaded weights, not from the masters of before.
    with torch.no_grad():
        tuned.model.again.weight = tuned.model.first.weight
    for parameter in tuned.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ff.SGD(tuned.parameters(), lr=0.1).step()
    for name in ("conv.weight", "first.weight", "again.weight"):
        assert same_bits(tuned.model.state_dict()[name], base[name]), name


def _as_parameter(model: nn.Module, other: Tensor) -> None:
    model.weight = nn.Parameter(other, requires_grad=False)


def _as_data(model: nn.Module, other: Tensor) -> None:
    dict(model.named_parameters())["weight"].data = other


@pytest.mark.parametrize("replace", [_as_parameter, _as_data])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_replaced_by_hand_is_followed(replace: Any, dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3).to(dtype)
    tuned = ff.train_only(model, mask_over_all(model))
    other = numbers(3, 4, seed=3).to(dtype)
    replace(model, other.clone())
    for parameter in tuned.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ff.SGD(tuned.parameters(), lr=0.1).step()
    assert same_bits(model.state_dict()["weight"], other)


def test_transposed_weight_is_followed() -> None:
    model = nn.Linear(4, 4)
    tuned = ff.train_only(model, mask_over_all(model))
    weight = model._parameters["weight"]
    other = weight.detach().t().contiguous()
    weight.data = weight.data.t()  # the same memory and version
    for parameter in tuned.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ff.SGD(tuned.parameters(), lr=0.1).step()
    assert same_bits(model.state_dict()["weight"], other)
    assert torch.equal(model.weight_values, other.flatten()[tuned.mask["weight"]])


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizing_a_masked_weight_is_refused(wrap: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    tuned = ff.train_only(model, mask_over_all(model))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"'0\.weight' was taken away; call release\(\)"):
        wrap(model[0])
    for parameter in tuned.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match=r"'0\.weight' had shape \(3, 4\).* is gone"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpu", "torch", "attached"])
def test_weight_written_by_hand_is_followed(backend: str) -> None:
    """``nn.init`` in place must not be undone by the masters at the next step."""
    model = nn.Linear(4, 3)
    tuned = ff.train_only(model, mask_over_all(model))
    if backend == "attached":
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        tuned.attach(optimizer)
    else:
        optimizer = ff.SGD(tuned.parameters(), lr=0.1, backend=backend)
    for value in (0.0, 2.0):
        with torch.no_grad():
            nn.init.constant_(model.weight, value)
        for parameter in tuned.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert bool((model.state_dict()["weight"] == value).all())


def test_state_dict_in_another_thread_loses_no_gradient() -> None:
    """It must not take the compact parameters out of the module, not even for a moment."""
    model = nn.Linear(4, 3)
    tuned = ff.train_only(model, mask_over_all(model))
    stop = threading.Event()

    def save_all_the_time() -> None:
        while not stop.is_set():
            assert set(model.state_dict()) == {"weight", "bias"}

    saver = threading.Thread(target=save_all_the_time)
    saver.start()
    try:
        for _ in range(1500):
            model.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            assert all(parameter.grad is not None for parameter in tuned.parameters())
    finally:
        stop.set()
        saver.join()


@pytest.mark.parametrize("shape", [(2, 2), (400, 300)], ids=["smaller", "larger"])
def test_weight_of_another_shape_is_refused_before_anything_is_written(shape: Any) -> None:
    model = nn.Linear(4, 3)
    tuned = ff.train_only(model, mask_over_all(model))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    replacement = torch.zeros(shape)
    model._parameters["weight"].data = replacement
    before = [parameter.detach().clone() for parameter in tuned.parameters()]
    with pytest.raises(RuntimeError, match=r"had shape \(3, 4\) in train_only and is of shape"):
        optimizer.step()
    assert not replacement.any()
    assert all(map(torch.equal, before, tuned.parameters()))


def test_mask_changed_by_its_owner_does_not_reach_the_step() -> None:
    model = nn.Linear(50, 50, bias=False)
    mask = ff.random_mask(model, density=0.5, seed=0)
    tuned = ff.train_only(model, mask)
    expected = set(mask["weight"].tolist())
    mask["weight"][:] = 2**31 - 1
    before = model.state_dict()["weight"].clone()
    (parameter,) = tuned.parameters()
    parameter.grad = torch.ones_like(parameter)
    ff.SGD([parameter], lr=1.0).step()
    changed = (model.state_dict()["weight"] != before).flatten().nonzero().flatten().tolist()
    assert set(changed) == expected


def test_trained_values_alone_go_through_a_distributed_checkpoint(tmp_path: Path) -> None:
    """Its ``ignore_frozen_params`` keeps no weight: the state dict has the base's, all frozen."""
    tuned, other = (
        ff.train_only(model, ff.random_mask(model, density=0.3, seed=0))
        for model in (nn.Linear(8, 4), nn.Linear(8, 4).bfloat16())
    )
    tuned.model(torch.ones(2, 8)).square().sum().backward()
    ff.SGD(tuned.parameters(), lr=0.1).step()
    options = StateDictOptions(ignore_frozen_params=True)
    assert not get_model_state_dict(tuned.model, options=options)
    dcp.save({"values": dict(tuned.named_parameters())}, checkpoint_id=tmp_path)
    dcp.load({"values": dict(other.named_parameters())}, checkpoint_id=tmp_path)
    other.model.state_dict()  # reads the weights
    assert_masters_match(other.model)
    for a, b in zip(tuned.parameters(), other.parameters(), strict=True):
        assert same_bits(a, b)
