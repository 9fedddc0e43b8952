"""Options from YAML, JSON and numpy: numbers are taken, anything else is named at construction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stepping import random_tensors, tune

import fishfast as ff

_OPTIMIZERS = {"AdamW": ff.AdamW, "Adam": ff.Adam, "SGD": ff.SGD}
every_optimizer = pytest.mark.parametrize("make", _OPTIMIZERS.values(), ids=_OPTIMIZERS)


def _tuned() -> ff.SparseTuning:
    return tune(random_tensors(5), [torch.arange(5)])


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("1e-3", "got '1e-3', which is text; pass float"),
        (None, "got None; leave it out for the default"),
        ("high", "got 'high', which is text"),
        ([1e-3], r"got \[0.001\]$"),
        (np.array([1e-3, 1e-3]), r"got shape \(2,\)"),
        (torch.ones(2), r"got shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@every_optimizer
def test_an_option_that_is_no_number_is_refused_at_construction(
    make: Any, name: str, value: Any, got: str
) -> None:
    parameters = list(_tuned().parameters())
    message = f"^{name} must be a number or a tensor with one element; {got}"
    with pytest.raises(ValueError, match=message):
        make(parameters, **{name: value})
    with pytest.raises(ValueError, match=f"^{name} must be a number"):
        make([{"params": parameters, name: value}])


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (ff.AdamW, {"eps": "1e-8"}),
        (ff.AdamW, {"betas": ("0.9", "0.999")}),
        (ff.SGD, {"momentum": "0.9"}),
        (ff.SGD, {"dampening": None}),
    ],
    ids=str,
)
def test_the_other_options_too(make: Any, options: dict[str, Any]) -> None:
    parameters = list(_tuned().parameters())
    name = "betas" if "betas" in options else next(iter(options))
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        make(parameters, **options)


def test_a_group_that_is_refused_changes_nothing() -> None:
    first, second = _tuned(), _tuned()
    optimizer = ff.AdamW(first.parameters())
    with pytest.raises(ValueError, match="got '1e-3' in a param group, which is text"):
        optimizer.add_param_group({"params": second.parameters(), "lr": "1e-3"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, np.array, torch.tensor], ids=lambda kind: kind.__name__
)
@every_optimizer
def test_numbers_of_numpy_and_torch_are_numbers(make: Any, kind: Any) -> None:
    """Those of numpy are worth what their float is: nothing is computed in float32 with them."""
    results = []
    for value in (kind(1e-2), float(kind(1e-2))):
        tuned = _tuned()
        optimizer = make(tuned.parameters(), lr=value, weight_decay=value)
        for turn in range(3):
            for parameter in tuned.parameters():
                parameter.grad = torch.ones_like(parameter.detach())
            if turn == 1:
                optimizer.param_groups[0]["lr"] = value * 2  # as a scheduler does
            optimizer.step()
        results.append(tuned.model.w0.detach().clone())
    if kind is torch.tensor:  # computes in its own precision, as with torch's optimizers
        assert torch.allclose(*results)
    else:
        assert torch.equal(*results)
