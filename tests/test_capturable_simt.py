"""Capturable steps: csrc/sparse_adam.cu and csrc/sparse_sgd.cu read everything on the device.

The kernels run on the CPU; a "graph" is the list of launches of a capture, with the arguments that
they were made with. The oracle is the ordinary C++ step, which computes learning rate, bias
corrections and loss scale on the host: all bits must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from copying import pickled
from simt.sparse_step_backend import BACKEND, SimulatedExtension
from stepping import (
    assert_state,
    gradients_over_time,
    random_tensors,
    same_bits,
    set_gradients,
    snapshot_of_ours,
    some_indices,
    state_of,
    steps_of_ours,
    tune,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fishfast as ff

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (ff.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW, amsgrad": (ff.AdamW, {"lr": 0.05, "amsgrad": True, "betas": (0.3, 0.5)}),
    "Adam": (ff.Adam, {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    "SGD": (ff.SGD, {"lr": 0.05}),
    "SGD, momentum": (ff.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.25}),
    "SGD, nesterov": (ff.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}
EACH = pytest.mark.parametrize("case", CASES)
# With a count of steps, which is what a replay and an overflow must get right.
COUNTING = pytest.mark.parametrize("case", ["AdamW, amsgrad", "SGD, momentum"])
SHAPES = ((37, 11), (1,), (1025,), (5, 3, 2, 2))


def rates(lr: float) -> Iterator[Any]:
    """Yield the learning rate in every form that a step takes."""
    yield from (lr, torch.tensor(lr), torch.tensor([lr]), torch.tensor(lr, dtype=torch.float64))


def pair(case: str, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, ...]:
    """Return handle and optimizer of an ordinary and of a capturable run of the same weights."""
    weights = [w.to(dtype) for w in random_tensors(*SHAPES)]
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)
    indices = [some_indices(w.numel()) for w in weights]
    return (*run(case, weights, indices, "cpu", False, **more),
            *run(case, weights, indices, BACKEND, True, **more))  # fmt: skip


def run(
    case: str, weights: Any, indices: Any, backend: str, capturable: bool, **more: Any
) -> tuple[ff.SparseTuning, torch.optim.Optimizer]:
    make, options = CASES[case]
    tuned = tune(weights, indices)
    options = {**options, **more, "backend": backend, "capturable": capturable}
    return tuned, make(tuned.parameters(), **options)


def series_of(steps: int) -> list[list[Tensor]]:
    return gradients_over_time(random_tensors(*SHAPES), steps)


def assert_alike(ours: Any, optimizer: Any, expected: Any, reference: Any) -> None:
    """Compare weights and states; a capturable SGD counts steps, too."""
    found, wanted = snapshot_of_ours(ours, optimizer), snapshot_of_ours(expected, reference)
    if isinstance(optimizer, ff.SGD):
        found = {name: value for name, value in found.items() if not name.endswith(".step")}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert same_bits(found[name], value), name
    for mine, other in zip(ours.parameters(), expected.parameters(), strict=True):
        assert same_bits(mine, other)


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


def warmed_up(case: str, **more: Any) -> tuple[Any, ...]:
    """Return a pair after one step each, and the same gradients in both."""
    runs = pair(case, **more)
    expected, reference, ours, optimizer = runs
    (gradients,) = series_of(1)
    steps_of_ours(expected, reference, [gradients])
    steps_of_ours(ours, optimizer, [gradients])
    return runs


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


# --- what a capture refuses, changing nothing ---


def set_option(**options: Any) -> Any:
    return lambda ours, optimizer: optimizer.param_groups[0].update(options)


def replace_weight(ours: Any, _: Any) -> None:
    ours.model.w0 = nn.Parameter(torch.ones(37, 11), requires_grad=False)


def write_weight(ours: Any, _: Any) -> None:
    with torch.no_grad():
        ours.model._parameters["w0"].zero_()


def move_weight(ours: Any, _: Any) -> None:
    weight = ours.model._parameters["w0"]
    weight.data = weight.data.clone()


def change_layout(ours: Any, _: Any) -> None:
    weight = ours.model._parameters["w3"]
    weight.data = weight.data.contiguous()


def load(_: Any, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def no_gradient(ours: Any, _: Any) -> None:
    next(iter(ours.parameters())).grad = None


CHANGES = {
    "lr": (set_option(lr=0.01), "options or state changed"),
    "weight decay": (set_option(weight_decay=0.5), "options or state changed"),
    "amsgrad": (set_option(amsgrad=True), "amsgrad changed"),
    "weight replaced": (replace_weight, "a weight was written to or replaced"),
    "weight written": (write_weight, "a weight was written to or replaced"),
    "weight moved": (move_weight, "parameters, weights or what has a gradient changed"),
    "layout": (change_layout, "parameters, weights or what has a gradient changed"),
    "state loaded": (load, "parameters, weights or what has a gradient changed"),
    "no gradient": (no_gradient, "parameters, weights or what has a gradient changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_capture_of_another_step_than_the_last_is_refused(
    change: str, simulated_steps: SimulatedExtension
) -> None:
    _, _, ours, optimizer = warmed_up("AdamW")
    set_gradients(ours, series_of(1)[0])
    changed, message = CHANGES[change]
    changed(ours, optimizer)
    masters = [p.detach().clone() for p in ours.parameters()]
    weights, state = state_of(ours.model), copy.deepcopy(optimizer.state_dict()["state"])
    with (
        pytest.raises(RuntimeError, match=rf"step\(\) cannot be captured: {message} since the"),
        simulated_steps.capture() as graph,
    ):
        optimizer.step()
    assert not graph.launches
    assert_state(ours.model, weights)
    assert all(same_bits(p, m) for p, m in zip(ours.parameters(), masters, strict=True))
    for entry, saved in zip(optimizer.state_dict()["state"].values(), state.values(), strict=True):
        assert entry.keys() == saved.keys()
        assert all(same_bits(entry[name], value) for name, value in saved.items())
    # One step as the error says, and the capture goes well.
    optimizer.step()
    with simulated_steps.capture() as graph:
        optimizer.step()
    assert len(graph.launches) == 1


@EACH
def test_capture_of_the_first_step_is_refused(
    case: str, simulated_steps: SimulatedExtension
) -> None:
    _, _, ours, optimizer = pair(case)
    set_gradients(ours, series_of(1)[0])
    with (
        pytest.raises(RuntimeError, match="cannot be captured: .* take a step like the captured"),
        simulated_steps.capture(),
    ):
        optimizer.step()
    assert not any(optimizer.state.values())


def test_capture_with_a_group_that_is_not_capturable_is_refused(
    simulated_steps: SimulatedExtension,
) -> None:
    _, _, ours, optimizer = warmed_up("AdamW")
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "capturable": False})
    with (
        pytest.raises(RuntimeError, match="cannot be captured with capturable=False in a param"),
        simulated_steps.capture(),
    ):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_learning_rate_of_another_dtype_is_refused(
    dtype: torch.dtype, simulated_steps: SimulatedExtension
) -> None:
    _, _, ours, optimizer = pair("AdamW", lr=torch.ones((), dtype=dtype))
    set_gradients(ours, series_of(1)[0])
    with pytest.raises(RuntimeError, match="lr of a capturable step must be a number, or a float"):
        optimizer.step()


# --- states ---


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_states_load_both_ways_mid_run(
    case: str, dtype: torch.dtype, simulated_steps: SimulatedExtension, tmp_path: Any
) -> None:
    """Ordinary, capturable, ordinary again: the bits of a run that never stopped."""
    series = series_of(6)
    expected, reference, *_ = pair(case, dtype)
    steps_of_ours(expected, reference, series)
    state: dict[str, Any] = {}
    for part in range(3):
        runs = pair(case, dtype)
        tuned, optimizer = runs[2:] if part == 1 else runs[:2]
        if state:
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
            tuned.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            assert optimizer.param_groups[0]["capturable"] is (part == 1)
        steps_of_ours(tuned, optimizer, series[2 * part : 2 * part + 2])
        state = {"model": tuned.model.state_dict(), "optimizer": optimizer.state_dict()}
    assert_alike(tuned, optimizer, expected, reference)


@EACH
def test_state_dict_has_the_names_of_torch(case: str, simulated_steps: SimulatedExtension) -> None:
    _, reference, _, optimizer = warmed_up(case)
    saved, ordinary = optimizer.state_dict(), reference.state_dict()
    for entry, other in zip(saved["state"].values(), ordinary["state"].values(), strict=True):
        assert entry.keys() == other.keys()
        assert all(same_bits(entry[name], value) for name, value in other.items())
    assert saved["param_groups"][0]["capturable"] is True


@pytest.mark.parametrize("ours_of", [ff.AdamW, ff.Adam])
def test_state_of_torch_capturable(ours_of: Any, simulated_steps: SimulatedExtension) -> None:
    """What torch's saves on the card: the step as an fp32 tensor beside the parameter."""
    _, _, ours, optimizer = warmed_up("AdamW")
    theirs = getattr(torch.optim, ours_of.__name__)(ours.parameters(), capturable=True)
    theirs.load_state_dict(optimizer.state_dict())
    assert theirs.param_groups[0]["capturable"] is True
    for state, other in zip(theirs.state.values(), optimizer.state.values(), strict=True):
        assert state.keys() == other.keys()
        assert state["step"].dtype == torch.float32
        assert all(same_bits(state[name], value) for name, value in other.items())
    for capturable, backend in ((True, BACKEND), (False, "cpu")):
        back = ours_of(ours.parameters(), capturable=capturable, backend=backend)
        back.load_state_dict(theirs.state_dict())
        assert back.param_groups[0]["capturable"] is capturable
        for state, other in zip(back.state.values(), optimizer.state.values(), strict=True):
            assert all(same_bits(state[name], value) for name, value in other.items())
            assert state["step"] is not other["step"]


def test_sgd_saved_before_any_step_counted(simulated_steps: SimulatedExtension) -> None:
    """Every step so far overflowed: the buffer is not one yet, and does not look like one."""
    expected, reference, ours, optimizer = pair("SGD, momentum")
    optimizer.found_inf = torch.ones(1)
    steps_of_ours(ours, optimizer, series_of(1))
    saved = optimizer.state_dict()
    assert all(entry == {"momentum_buffer": None} for entry in saved["state"].values())
    for capturable, backend in ((True, BACKEND), (False, "cpu")):
        make, options = CASES["SGD, momentum"]
        options = {**options, "capturable": capturable, "backend": backend}
        resumed = make(ours.parameters(), **options)
        resumed.load_state_dict(copy.deepcopy(saved))
        before = state_of(ours.model)
        steps_of_ours(ours, resumed, series_of(2))
        after = state_of(ours.model)
        steps_of_ours(expected, reference, series_of(2))
        assert_state(expected.model, after)
        for tuned in (ours, expected):
            tuned.model.load_state_dict(before)
        reference.state.clear()


@COUNTING
def test_capturable_switched_on_and_off(case: str, simulated_steps: SimulatedExtension) -> None:
    expected, reference, ours, optimizer = pair(case)
    for position, gradients in enumerate(series_of(6)):
        optimizer.param_groups[0]["capturable"] = position % 4 < 2
        steps_of_ours(ours, optimizer, [gradients])
        steps_of_ours(expected, reference, [gradients])
        assert_alike(ours, optimizer, expected, reference)


@EACH
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copy_trains_alone(case: str, copied: Any, simulated_steps: SimulatedExtension) -> None:
    expected, reference, ours, optimizer = warmed_up(case)
    before = state_of(ours.model)
    other, its_optimizer = copied((ours, optimizer))
    series = series_of(2)
    steps_of_ours(other, its_optimizer, series)
    steps_of_ours(expected, reference, series)
    assert_alike(other, its_optimizer, expected, reference)
    assert_state(ours.model, before)


@COUNTING
def test_remask_goes_on(case: str, simulated_steps: SimulatedExtension) -> None:
    results = []
    for tuned, optimizer in zip(*[iter(warmed_up(case))] * 2, strict=True):
        with tuned.released() as plain:
            mask = ff.random_mask(plain, density=0.4, seed=3)
        tuned.remask(mask, optimizer=optimizer)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in tuned.parameters():
                parameter.grad = torch.randn(len(parameter), generator=generator)
            optimizer.step()
        results.append((tuned, optimizer))
    (expected, reference), (ours, optimizer) = results
    assert_alike(ours, optimizer, expected, reference)
