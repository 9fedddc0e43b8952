"""The masked gradient's benchmark gives no figure for a wrong gradient, ours or the floor's."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

_BENCH = Path(__file__).parents[1] / "bench"
_CPU = torch.device("cpu")
_FLOOR = "dense gradient, gathered"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("FISHFAST_BENCH", "toy")
    monkeypatch.syspath_prepend(str(_BENCH))
    found = importlib.import_module("bench_masked_grad")
    found._operands.cache_clear()
    return found


def _run(module: ModuleType, contender: str, name: str) -> dict[str, Any]:
    benchmark = SimpleNamespace(
        name="case", extra_info={}, pedantic=lambda call, args=(), **_: call(*args)
    )
    try:
        module.bench_masked_grad(benchmark, contender, name, 0.02, _CPU)
    except AssertionError:
        assert benchmark.extra_info == {}
        raise
    return benchmark.extra_info


@pytest.mark.parametrize("contender", [_FLOOR, "fishfast"])
@pytest.mark.parametrize("name", ["linear 8 x 24 x 16", "conv3x3", "embedding"])
def test_a_right_gradient_gets_a_line(
    module: ModuleType, name: str, contender: str, capsys: Any
) -> None:
    figures = _run(module, contender, name)
    assert figures["case"] == f"{name}, 2 %"
    assert figures["relative_error"] < 1e-5
    assert figures["floor_name"] == _FLOOR
    assert capsys.readouterr().out.startswith(f"{contender} ")


@pytest.mark.parametrize("planted", [_FLOOR, "fishfast"])
@pytest.mark.parametrize("wrong", [1.0001, torch.nan], ids=["a little off", "NaN"])
def test_a_wrong_gradient_gets_no_figure(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, planted: str, wrong: float
) -> None:
    right = module._weight_gradient

    def spoiled(layer: Any, x: Any, grad: Any) -> Any:
        run = right(layer, x, grad)
        masked = any(not p.requires_grad for p in layer.parameters())
        exact = grad.dtype == torch.float64
        return run if exact or masked is (planted == _FLOOR) else lambda: wrong * run()

    monkeypatch.setattr(module, "_weight_gradient", spoiled)
    with pytest.raises(AssertionError, match=r"^fishfast on conv3x3, 2 % is wrong: .*; no figure$"):
        _run(module, "fishfast", "conv3x3")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("planted", [_FLOOR, "fishfast"])
def test_a_kept_gradient_gets_no_figure(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, planted: str
) -> None:
    right = module._weight_gradient

    def kept(layer: Any, x: Any, grad: Any) -> Any:
        run = right(layer, x, grad)
        masked = any(not p.requires_grad for p in layer.parameters())
        return functools.cache(run) if masked is (planted == "fishfast") else run

    monkeypatch.setattr(module, "_weight_gradient", kept)
    grad = module._operands("conv3x3", _CPU).grad
    before = grad.clone()
    with pytest.raises(AssertionError, match=r"^fishfast on conv3x3, 2 % is wrong: .*; no figure$"):
        _run(module, "fishfast", "conv3x3")
    assert capsys.readouterr().out == ""
    assert torch.equal(grad, before)
