"""What both optimizers refuse; a refused step changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sparse_optimizer_makers import BACKENDS, MAKERS, Make
from stepping import (
    assert_state,
    random_tensors,
    same_bits,
    set_gradients,
    state_of,
    steps_of_ours,
    tune,
)
from torch import nn

import fishfast as ff
from fishfast.optim import capturable


def assert_step_refused(
    optimizer: torch.optim.Optimizer, tuned: ff.SparseTuning, message: str
) -> None:
    before = state_of(tuned.model)
    masters = [p.detach().clone() for p in tuned.parameters()]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_state(tuned.model, before)
    assert all(same_bits(p, m) for p, m in zip(tuned.parameters(), masters, strict=True))
    assert not any(optimizer.state.values())


@contextlib.contextmanager
def unchanged(optimizer: torch.optim.Optimizer, tuned: ff.SparseTuning) -> Iterator[None]:
    """Check that weights, masters and the optimizer's state stay as they are."""

    def everything() -> list[torch.Tensor]:
        state = [t for entry in optimizer.state.values() for t in entry.values()]
        weights = [p.target.weight() for p in tuned.parameters()]
        return [t.detach().clone() for t in (*tuned.parameters(), *weights, *state)]

    before = everything()
    yield
    assert all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))


@MAKERS
def test_sparse_gradient_is_refused(make: Make) -> None:
    tuned = tune(random_tensors(5, 5), [torch.arange(5)] * 2)
    first, second = tuned.parameters()
    first.grad, second.grad = torch.ones(5), torch.ones(5).to_sparse()
    assert_step_refused(
        make(tuned.parameters()), tuned, "gradients must be dense float32; got .*sparse_coo"
    )


@MAKERS
def test_model_moved_to_double_is_refused(make: Make) -> None:
    tuned = tune(random_tensors(5, 5), [torch.arange(5)] * 2)
    set_gradients(tuned, [torch.ones(5)] * 2)
    tuned.model.double()
    assert_step_refused(
        make(tuned.parameters()), tuned, r"the model was moved to torch.float64 after train_only"
    )


@MAKERS
def test_state_on_another_device_is_refused(make: Make) -> None:
    weights = random_tensors(5)
    tuned = tune(weights, [torch.arange(5)])
    optimizer = make(tuned.parameters())
    steps_of_ours(tuned, optimizer, [[torch.ones(5)]])
    before = state_of(tuned.model)
    for state in optimizer.state.values():
        state.update({name: value.to("meta") for name, value in state.items() if value.dim()})
    set_gradients(tuned, [torch.ones(5)])
    with pytest.raises(RuntimeError, match="state must be where its parameter is; got .* on meta"):
        optimizer.step()
    assert_state(tuned.model, before)


@MAKERS
def test_plain_parameter_moved_to_another_layout_is_refused(make: Make) -> None:
    # Its gradient would be read in another order than its values are stored in.
    tuned = tune(random_tensors(5), [torch.arange(5)])
    conv = nn.Conv2d(3, 4, 3)
    optimizer = make([*tuned.parameters(), *conv.parameters()])
    conv.to(memory_format=torch.channels_last)
    conv.weight.grad = torch.ones_like(conv.weight)
    set_gradients(tuned, [torch.ones(5)])
    assert_step_refused(optimizer, tuned, r"parameters must be contiguous; got .*\(4, 3, 3, 3\)")


@MAKERS
@pytest.mark.parametrize(
    "parameter",
    [
        nn.Parameter(torch.ones(4, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(4, dtype=torch.float64)),
        nn.Parameter(torch.ones(4, 4).t()[:2]),
    ],
    ids=["bfloat16", "float64", "not contiguous"],
)
def test_parameters_that_are_refused(make: Make, parameter: nn.Parameter) -> None:
    message = "params must be compact parameters or contiguous float32 ones; got torch"
    with pytest.raises(ValueError, match=message):
        make([parameter])
    tuned = tune(random_tensors(5), [torch.arange(5)])
    optimizer = make(tuned.parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter]})
    assert len(optimizer.param_groups) == 1


REFUSED = {
    "capturable": "capturable must be False for parameters on cpu; got True: .* move the model",
    "differentiable": "differentiable must be False; got True: weights are written in place",
}


@MAKERS
@pytest.mark.parametrize("option", REFUSED)
def test_options_of_torch_that_are_refused(make: Make, option: str) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    optimizer = make(tuned.parameters())
    group = {"params": [nn.Parameter(torch.ones(3))], option: True}
    with pytest.raises(ValueError, match=REFUSED[option]):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=REFUSED[option]):
        make(tuned.parameters(), **{option: True})


@MAKERS
def test_capturable_switched_on_by_hand_is_refused(make: Make) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    optimizer = make(tuned.parameters())
    optimizer.param_groups[0]["capturable"] = True
    set_gradients(tuned, [torch.ones(5)])
    before = state_of(tuned.model)
    with pytest.raises(ValueError, match=REFUSED["capturable"]):
        optimizer.step()
    assert_state(tuned.model, before)
    assert not any(optimizer.state.values())


@MAKERS
def test_capturable_without_the_cuda_kernels_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    monkeypatch.setattr(capturable, "_DEVICE_TYPES", ("cpu",))  # what "auto" takes there is no card
    with pytest.raises(ValueError, match="capturable must be False with the 'torch' backend; got"):
        make(tuned.parameters(), capturable=True, backend="torch")


@MAKERS
def test_step_in_a_cuda_graph_capture_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    set_gradients(tuned, [torch.ones(5)])
    optimizer = make(tuned.parameters())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    message = r"step\(\) cannot be captured with capturable=False .* outside the CUDA graph"
    assert_step_refused(optimizer, tuned, message)


@MAKERS
def test_lr_of_several_elements_is_refused(make: Make) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    message = r"lr must be a number or a tensor with one element; got shape \(2,\)"
    with pytest.raises(ValueError, match=message):
        make(tuned.parameters(), lr=torch.ones(2))


@MAKERS
def test_unknown_backend_is_refused(make: Make) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*; got 'mps'"):
        make(tuned.parameters(), backend="mps")


@MAKERS
def test_no_parameters_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])


def short(value: torch.Tensor) -> torch.Tensor:
    return value[:-1].clone()


def strided(value: torch.Tensor) -> torch.Tensor:
    return value.repeat_interleave(2)[::2]


@MAKERS
@BACKENDS
@pytest.mark.parametrize("convert", [torch.Tensor.bfloat16, torch.Tensor.double, short, strided])
def test_state_of_another_form_is_refused(make: Make, backend: str, convert: Any) -> None:
    tuned = tune(random_tensors(5, 5), [torch.arange(5)] * 2)
    optimizer = make(tuned.parameters(), backend=backend)
    steps_of_ours(tuned, optimizer, [[torch.ones(5)] * 2])
    state = optimizer.state[list(tuned.parameters())[1]]
    name = next(name for name in state if name != "step")
    state[name] = convert(state[name])
    set_gradients(tuned, [torch.ones(5)] * 2)
    with (
        unchanged(optimizer, tuned),
        pytest.raises(RuntimeError, match=f"state must be contiguous float32 .* got '{name}'"),
    ):
        optimizer.step()


@pytest.mark.parametrize("count", [1.0, torch.ones(2), torch.ones((), dtype=torch.bfloat16)])
def test_step_count_of_another_form_is_refused(count: Any) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    optimizer = ff.AdamW(tuned.parameters())
    steps_of_ours(tuned, optimizer, [[torch.ones(5)]])
    (state,) = optimizer.state.values()
    state["step"] = count
    set_gradients(tuned, [torch.ones(5)])
    with pytest.raises(RuntimeError, match=r"state\['step'\] must be a float32 tensor of one elem"):
        optimizer.step()
    for as_torch_makes_it in (torch.ones((), dtype=torch.float64), torch.ones(1)):
        state["step"] = as_torch_makes_it
        optimizer.step()
        assert float(state["step"]) == 2


@MAKERS
@BACKENDS
@pytest.mark.parametrize(
    "options", [{"lr": "0.1"}, {"lr": torch.ones(2)}, {"weight_decay": None}, {"betas": (0.9,)},
                {"betas": (1.0, 0.9)}]
)  # fmt: skip
def test_a_bad_option_in_a_group_changes_nothing(make: Make, backend: str, options: Any) -> None:
    tuned = tune(random_tensors(5, 5), [torch.arange(5)] * 2)
    first, second = tuned.parameters()
    optimizer = make([{"params": [first]}, {"params": [second]}], backend=backend)
    if options.keys() - optimizer.param_groups[1].keys():
        pytest.skip("SGD has no betas")
    steps_of_ours(tuned, optimizer, [[torch.ones(5)] * 2])
    set_gradients(tuned, [torch.ones(5)] * 2)
    optimizer.param_groups[1].update(options)
    with (
        unchanged(optimizer, tuned),
        pytest.raises((TypeError, ValueError), match=f"{next(iter(options))} must be "),
    ):
        optimizer.step()


@MAKERS
def test_a_refused_step_does_not_follow_weights(make: Make) -> None:
    tuned = tune(random_tensors(5, 5), [torch.arange(5)] * 2)
    optimizer = make(tuned.parameters())
    set_gradients(tuned, [torch.ones(5)] * 2)
    nn.init.zeros_(tuned.model.w0)
    tuned.model._parameters["w1"].data = tuned.model.w1.detach().double()
    with (
        unchanged(optimizer, tuned),
        pytest.raises(RuntimeError, match="the model was moved to torch.float64"),
    ):
        optimizer.step()
