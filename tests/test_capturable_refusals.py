"""What the capture of a step refuses, changing nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from capturable_runs import EACH, pair, series_of, warmed_up
from simt.sparse_step_backend import SimulatedExtension
from stepping import same_bits, set_gradients
from torch import nn


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
    "weight moved": (move_weight, "a weight was written to or replaced"),
    "layout": (change_layout, "a weight was written to or replaced"),
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
    # As they lie in memory: a read would take over what was written.
    raw = {n: p for n, p in ours.model._parameters.items() if not n.endswith("_values")}
    weights = {name: weight.detach().clone() for name, weight in raw.items()}
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with (
        pytest.raises(RuntimeError, match=rf"step\(\) cannot be captured: {message} since the"),
        simulated_steps.capture() as graph,
    ):
        optimizer.step()
    assert not graph.launches
    assert all(same_bits(raw[name].detach(), weights[name]) for name in weights)
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
