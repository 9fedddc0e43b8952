"""States of capturable optimizers: to and from ordinary ones and torch's, copies, remask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from capturable_runs import CASES, COUNTING, EACH, assert_alike, pair, series_of, warmed_up
from copying import pickled, through_a_file
from simt.sparse_step_backend import BACKEND, SimulatedExtension
from stepping import assert_state, same_bits, state_of, steps_of_ours

import fishfast as ff


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
            tuned.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            assert optimizer.param_groups[0]["capturable"] is (part == 1)
        steps_of_ours(tuned, optimizer, series[2 * part : 2 * part + 2])
        state = through_a_file(tuned, optimizer, tmp_path / "state.pt")
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
