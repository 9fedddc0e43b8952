"""Capturable steps: csrc/sparse_adam.cu and csrc/sparse_sgd.cu read everything on the device.

The kernels run on the CPU; a "graph" is the list of launches of a capture, with the arguments that
they were made with. The oracle is the ordinary C++ step, which computes learning rate, bias
corrections and loss scale on the host: all bits must agree.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from capturable_runs import (
    COUNTING,
    EACH,
    assert_alike,
    pair,
    rates,
    run,
    series_of,
    warmed_up,
)
from simt.sparse_step_backend import BACKEND, SimulatedExtension
from stepping import (
    assert_state,
    gradients_over_time,
    random_tensors,
    same_bits,
    set_gradients,
    some_indices,
    state_of,
    steps_of_ours,
    tune,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fishfast as ff

# --- steps outside a graph ---


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_the_ordinary_step_bit_for_bit(
    case: str, dtype: torch.dtype, simulated_steps: SimulatedExtension
) -> None:
    for lr in rates(0.05):
        expected, reference, ours, optimizer = pair(case, dtype, lr=lr)
        series = series_of(5)
        series[0][1] = series[2][0] = series[3][1] = None  # type: ignore[call-overload]
        for gradients in series:
            steps_of_ours(expected, reference, [gradients])
            steps_of_ours(ours, optimizer, [gradients])
            assert_alike(ours, optimizer, expected, reference)
    assert simulated_steps.launches == 4 * 5


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.99), (0.5, 0.0)])
@pytest.mark.parametrize("lr", [3e-4, torch.tensor(3e-4)], ids=["number", "fp32 tensor"])
def test_bias_corrections_of_many_step_counts(
    betas: tuple[float, float], lr: Any, simulated_steps: SimulatedExtension
) -> None:
    """The device takes beta to the power of the step in two doubles, the host with libm's pow."""
    expected, reference, ours, optimizer = pair("AdamW", lr=lr, betas=betas)
    (first,), (second,) = series_of(1), series_of(1)
    for count in (0, 1, 2, 9, 63, 64, 997, 54_321, 2**20 + 1, 2**24 - 2):
        for tuned, stepper, gradients in (
            (expected, reference, first),
            (ours, optimizer, second),
        ):
            steps_of_ours(tuned, stepper, [gradients])
            for state in stepper.state.values():
                state["step"].fill_(count)
        assert_alike(ours, optimizer, expected, reference)


def test_more_parameters_than_one_launch_prepares(simulated_steps: SimulatedExtension) -> None:
    weights = random_tensors(*[3] * 483)
    indices = [torch.tensor([1])] * 483
    expected, reference = run("AdamW", weights, indices, "cpu", False)
    ours, optimizer = run("AdamW", weights, indices, BACKEND, True)
    for gradients in gradients_over_time(weights, 2):
        steps_of_ours(expected, reference, [gradients])
        steps_of_ours(ours, optimizer, [gradients])
    assert_alike(ours, optimizer, expected, reference)


@EACH
def test_nothing_is_read_on_the_host_or_uploaded_again(
    case: str, simulated_steps: SimulatedExtension
) -> None:
    class NoRead(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    _, _, ours, optimizer = pair(case, lr=torch.tensor(0.05))
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(1), torch.full((1,), 2.0)
    series = series_of(4)
    for step, gradients in enumerate(series):
        set_gradients(ours, gradients)  # at other addresses each time
        with NoRead():
            optimizer.step()
        if step == 0:
            uploaded = simulated_steps.uploads
    assert uploaded == 2  # rows and plans
    assert simulated_steps.uploads == uploaded
    with pytest.raises(AssertionError), NoRead():  # it does notice
        float(torch.ones(()))


@EACH
def test_learning_rate_and_options_changed_between_steps(
    case: str, simulated_steps: SimulatedExtension
) -> None:
    for lr in rates(0.05):
        expected, reference, ours, optimizer = pair(case, lr=copy.deepcopy(lr))
        for position, gradients in enumerate(series_of(4)):
            for tuned, stepper in ((expected, reference), (ours, optimizer)):
                (group,) = stepper.param_groups
                if isinstance(lr, Tensor):  # pair gave both the same tensor
                    group["lr"] = torch.full_like(lr, 0.05 / (1 + position))
                else:
                    group["lr"] = 0.05 / (1 + position)
                group["weight_decay"] = 0.01 * position
                steps_of_ours(tuned, stepper, [gradients])
        assert_alike(ours, optimizer, expected, reference)


def test_groups_that_are_capturable_and_not(simulated_steps: SimulatedExtension) -> None:
    weights, series = random_tensors(40, 50), gradients_over_time(random_tensors(40, 50), 3)
    indices = [some_indices(w.numel()) for w in weights]
    expected, mixed = tune(weights, indices), tune(weights, indices)
    reference = ff.AdamW(expected.parameters(), lr=0.1, backend="cpu")
    first, second = mixed.parameters()
    optimizer = ff.AdamW([first], lr=0.1, backend=BACKEND)
    optimizer.add_param_group({"params": [second], "capturable": True})
    for gradients in series:
        steps_of_ours(expected, reference, [gradients])
        steps_of_ours(mixed, optimizer, [gradients])
    assert_alike(mixed, optimizer, expected, reference)
    before = state_of(mixed.model)
    optimizer.found_inf = torch.ones(1)
    steps_of_ours(mixed, optimizer, series[:1])
    assert_state(mixed.model, before)


# --- loss scaling ---


@COUNTING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_overflow_skips_the_whole_step(
    case: str, dtype: torch.dtype, simulated_steps: SimulatedExtension
) -> None:
    """Also the first one of all, which for SGD's momentum the host cannot know."""
    expected, reference, ours, optimizer = pair(case, dtype)
    optimizer.grad_scale = torch.full((1,), 8.0)
    for gradients, overflow in zip(series_of(6), (1, 0, torch.nan, 0, torch.inf, 0), strict=True):
        optimizer.found_inf = torch.full((1,), float(overflow))
        before = state_of(ours.model)
        set_gradients(ours, [g * 8.0 for g in gradients])
        optimizer.step()
        if overflow:
            assert_state(ours.model, before)
        else:
            steps_of_ours(expected, reference, [gradients])
            assert_alike(ours, optimizer, expected, reference)


@EACH
def test_under_a_grad_scaler(case: str, simulated_steps: SimulatedExtension) -> None:
    expected, reference, ours, optimizer = pair(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for position, gradients in enumerate(series_of(6)):
        scale = float(scaler.scale(torch.ones(())))
        scaled = [g * scale for g in gradients]
        if position == 2:
            scaled[0] = torch.full_like(scaled[0], torch.inf)
        set_gradients(ours, scaled)
        scaler.step(optimizer)
        scaler.update()
        if position != 2:
            steps_of_ours(expected, reference, [gradients])
        assert_alike(ours, optimizer, expected, reference)
    assert scaler.get_scale() == 2048.0  # doubled, halved, doubled
    assert not hasattr(optimizer, "found_inf")


# --- replays ---


@EACH
def test_replays_equal_ordinary_steps(case: str, simulated_steps: SimulatedExtension) -> None:
    """New gradients, learning rates, loss scales and overflows, all in the captured memory."""
    lr = torch.tensor(0.05)
    expected, reference, ours, optimizer = warmed_up(case, lr=lr)
    reference.param_groups[0]["lr"] = lr.clone()
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(1), torch.ones(1)
    found_inf, grad_scale = optimizer.found_inf, optimizer.grad_scale
    set_gradients(ours, series_of(1)[0])
    launches, before = simulated_steps.launches, state_of(ours.model)
    with simulated_steps.capture() as graph:
        optimizer.step()
    assert len(graph.launches) == 1
    assert simulated_steps.launches == launches
    assert_state(ours.model, before)  # a capture runs nothing
    held = [p.grad for p in ours.parameters()]
    for parameter in ours.parameters():  # the graph knows addresses, not Python's objects
        parameter.grad = None
    del optimizer.found_inf, optimizer.grad_scale
    uploads = simulated_steps.uploads
    for position, gradients in enumerate(series_of(6)):
        scale = 2.0**position
        lr.fill_(0.1 / (1 + position))
        reference.param_groups[0]["lr"].copy_(lr)
        found_inf.fill_(float(position == 3))
        grad_scale.fill_(scale)
        set_gradients(expected, gradients)
        for grad, parameter in zip(held, expected.parameters(), strict=True):
            grad.copy_(parameter.grad * scale)
        graph.replay()
        if position != 3:
            reference.step()
        assert_alike(ours, optimizer, expected, reference)
    assert simulated_steps.uploads == uploads


@COUNTING
def test_ordinary_steps_between_replays(case: str, simulated_steps: SimulatedExtension) -> None:
    expected, reference, ours, optimizer = warmed_up(case)
    (captured,), series = series_of(1), series_of(5)
    set_gradients(ours, captured)
    with simulated_steps.capture() as graph:
        optimizer.step()
    held = [p.grad for p in ours.parameters()]
    for gradients in series:
        graph.replay()
        steps_of_ours(ours, optimizer, [gradients])
        steps_of_ours(expected, reference, [captured, gradients])
        assert_alike(ours, optimizer, expected, reference)
    assert all(grad is not None for grad in held)  # the graph's memory, kept until here


@COUNTING
def test_two_graphs_with_gradients_of_their_own(
    case: str, simulated_steps: SimulatedExtension
) -> None:
    expected, reference, ours, optimizer = warmed_up(case)
    series, held, graphs = series_of(2), [], []
    for gradients in series:
        set_gradients(ours, gradients)
        held.append([p.grad for p in ours.parameters()])
        with simulated_steps.capture() as graph:
            optimizer.step()
        graphs.append(graph)
    for turn in (0, 1, 1, 0):
        graphs[turn].replay()
        steps_of_ours(expected, reference, [series[turn]])
        assert_alike(ours, optimizer, expected, reference)


@EACH
def test_graph_of_before_a_load_leaves_the_loaded_state_alone(
    case: str, simulated_steps: SimulatedExtension
) -> None:
    """It goes on with the state of before, in memory that the optimizer keeps for it."""
    _, _, ours, optimizer = warmed_up(case)
    set_gradients(ours, series_of(1)[0])
    with simulated_steps.capture() as graph:
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [dict(state) for state in copy.deepcopy(optimizer).state.values()]
    graph.replay()
    for state, saved in zip(optimizer.state.values(), before, strict=True):
        assert all(same_bits(state[name], value) for name, value in saved.items())
    steps_of_ours(ours, optimizer, series_of(2))
