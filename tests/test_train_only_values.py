"""What others write into compact values is in their weight when it is next read."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import mask_of, same_bits
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fishfast as ff


def tuned_model(dtype: torch.dtype = torch.float32) -> ff.SparseTuning:
    """Make a model with a weight on the rows road and one on the tap."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype)
    return ff.train_only(
        model, mask_of(model, {"0.weight": torch.tensor([1, 5]), "1.weight": torch.tensor([0, 3])})
    )


def raw(tuned: ff.SparseTuning) -> list[Tensor]:
    """Return the masked entries as they lie in memory, read past the modules."""
    modules = [tuned.model.get_submodule(name) for name in ("0", "1")]
    weights = [module._parameters["weight"].detach().flatten() for module in modules]
    return [weights[0][[1, 5]], weights[1][[0, 3]]]


def written(tuned: ff.SparseTuning) -> bool:
    values = [p.detach().to(p.target.weight().dtype) for p in tuned.parameters()]
    return all(same_bits(a, b) for a, b in zip(raw(tuned), values, strict=True))


def in_no_grad(write: Callable[[Tensor], Any]) -> Callable[[ff.SparseTuning], None]:
    @torch.no_grad()
    def each(tuned: ff.SparseTuning) -> None:
        for parameter in tuned.parameters():
            write(parameter)

    return each


def replace_twice(parameter: Tensor) -> None:
    for _ in range(2):  # the second may get the address of the first
        parameter.data = parameter.data * 1.5


def all_at_once(tuned: ff.SparseTuning) -> None:
    vector_to_parameters(parameters_to_vector(tuned.parameters()) + 1, tuned.parameters())


WRITES = {
    "copy_": in_no_grad(lambda p: p.copy_(torch.full_like(p, 7.0))),
    "add_": in_no_grad(lambda p: p.add_(0.25)),
    "clamp_": in_no_grad(lambda p: p.clamp_(min=2.0)),
    "data.copy_": lambda t: [p.data.copy_(p.detach() + 1) for p in t.parameters()],
    "data replaced": lambda t: [replace_twice(p) for p in t.parameters()],
    "in inference mode": torch.inference_mode()(in_no_grad(lambda p: p.mul_(1.5))),
    "set_": in_no_grad(lambda p: p.set_(p.detach() + 1)),
    "vector_to_parameters": all_at_once,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_into_values_is_in_the_forward(write: Any, dtype: torch.dtype) -> None:
    tuned = tuned_model(dtype)
    before = raw(tuned)
    write(tuned)
    assert all(same_bits(a, b) for a, b in zip(raw(tuned), before, strict=True))
    assert not written(tuned)
    tuned.model(torch.ones(1, 4, dtype=dtype))
    assert written(tuned)


def no_grad_forward(tuned: ff.SparseTuning) -> None:
    with torch.no_grad():
        tuned.model(torch.ones(1, 4))


def inference_forward(tuned: ff.SparseTuning) -> None:
    with torch.inference_mode():
        tuned.model(torch.ones(1, 4))


def one_step(tuned: ff.SparseTuning) -> None:
    for parameter in tuned.parameters():
        parameter.grad = torch.ones_like(parameter)
    values = [p.detach().clone() for p in tuned.parameters()]
    ff.SGD(tuned.parameters(), lr=1.0).step()
    assert all(same_bits(p, v - 1) for p, v in zip(tuned.parameters(), values, strict=True))


READINGS: dict[str, Callable[[ff.SparseTuning], Any]] = {
    "no_grad": no_grad_forward,
    "inference mode": inference_forward,
    "attribute": lambda tuned: [module.weight for module in tuned.model],
    "state_dict": lambda tuned: tuned.model.state_dict(),
    "moved": lambda tuned: tuned.model.to(torch.bfloat16),
    "copied": lambda tuned: copy.deepcopy(tuned.model),
    "pickled": lambda tuned: torch.save(tuned.model, io.BytesIO()),
    "rebase": lambda tuned: tuned.rebase(),
    "remask": lambda tuned: tuned.remask(tuned.mask),
    "step": one_step,
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS.keys())
def test_a_write_into_values_reaches_every_reading(read: Callable[..., Any]) -> None:
    tuned = tuned_model()
    WRITES["add_"](tuned)
    expected = [p.detach().clone() for p in tuned.parameters()]
    assert not written(tuned)
    read(tuned)
    assert written(tuned)
    if read is not one_step:
        assert all(same_bits(p, e) for p, e in zip(tuned.parameters(), expected, strict=True))


def test_released_models_and_deltas_have_what_was_written(tmp_path: Path) -> None:
    tuned = tuned_model()
    WRITES["copy_"](tuned)
    ff.save_delta(tuned, tmp_path / "delta")
    assert all(v.eq(7).all() for v in ff.load_delta(tmp_path / "delta").values.values())
    WRITES["add_"](tuned)
    with tuned.released():
        assert all(v.eq(7.25).all() for v in raw(tuned))
    WRITES["add_"](tuned)
    tuned.release()
    assert all(v.eq(7.5).all() for v in raw(tuned))


def test_gradients_at_a_perturbed_point_are_those_of_a_plain_model() -> None:
    tuned = tuned_model()
    x = torch.randn(3, 4)
    tuned.model(x).square().sum().backward()
    ascent = [p.grad.sign() for p in tuned.parameters()]
    with torch.no_grad():  # sharpness-aware minimization
        for parameter, step in zip(tuned.parameters(), ascent, strict=True):
            parameter.add_(step)
            parameter.grad = None
    plain = copy.deepcopy(tuned)
    plain = plain.release().requires_grad_()
    plain(x).square().sum().backward()
    tuned.model(x).square().sum().backward()
    for parameter, module in zip(tuned.parameters(), plain, strict=True):
        expected = module.weight.grad.flatten()[parameter.target.indices]
        torch.testing.assert_close(parameter.grad, expected)


def test_a_write_between_forward_and_backward_is_refused_as_on_a_plain_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tuned = ff.train_only(
        model, mask_of(model, {"0.weight": torch.tensor([0]), "1.weight": torch.tensor([1])})
    )
    loss = model(torch.ones(1, 4)).sum()
    WRITES["add_"](tuned)
    model(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_where_the_weight_was_written_to_as_well_it_stands() -> None:
    tuned = tuned_model()
    WRITES["add_"](tuned)
    nn.init.zeros_(tuned.model[0]._parameters["weight"])
    tuned.model.state_dict()
    values = next(tuned.parameters())
    values.grad = torch.zeros_like(values)
    ff.SGD([values], lr=1.0).step()
    assert torch.cat([raw(tuned)[0], values]).eq(0).all()


def test_a_copy_takes_a_write_before_its_first_step() -> None:
    tuned = copy.deepcopy(tuned_model())
    WRITES["copy_"](tuned)
    values = next(tuned.parameters())
    values.grad = torch.ones_like(values)
    ff.SGD([values], lr=1.0).step()
    assert torch.cat([raw(tuned)[0], values]).eq(6).all()


def test_values_of_another_form_are_refused() -> None:
    tuned = tuned_model()
    values = next(tuned.parameters())
    values.grad = torch.ones_like(values)
    before = raw(tuned)
    values.data = values.data.bfloat16()
    with pytest.raises(RuntimeError, match=r"must stay float32 of shape \(2,\); got torch.bf"):
        ff.SGD([values], lr=1.0).step()
    assert all(same_bits(a, b) for a, b in zip(raw(tuned), before, strict=True))


@pytest.mark.parametrize("attached", [False, True])
def test_a_weight_that_another_replaced_at_the_same_address_is_followed(attached: bool) -> None:
    # What ``weight.data = weight.data * 1.5`` does, twice in a row: the first one's memory is
    # that of the second.
    model, memory = nn.Linear(4, 4), bytearray(64)
    tuned = ff.train_only(model, ff.random_mask(model, k=9, seed=0))
    make = torch.optim.SGD if attached else ff.SGD
    optimizer = make(tuned.parameters(), lr=0.0)
    if attached:
        tuned.attach(optimizer)
    weight = model._parameters["weight"]
    for parameter in tuned.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for numbers in (torch.arange(16.0), torch.arange(16.0) * 1.5):
        memory[:] = numbers.numpy().tobytes()
        weight.data = torch.frombuffer(memory, dtype=torch.float32).view(4, 4)
        optimizer.step()
        assert same_bits(weight.detach().flatten(), numbers)


def test_a_delta_saved_after_a_write_to_the_weight_has_it(tmp_path: Path) -> None:
    tuned = tuned_model()
    model = tuned.model
    with torch.no_grad():
        model[1].weight[0] = 3.0
    ff.save_delta(tuned, tmp_path / "delta")
    assert ff.load_delta(tmp_path / "delta").values["1.weight"][0] == 3.0
