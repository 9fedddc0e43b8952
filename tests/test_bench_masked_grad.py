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
        module.bench_masked_grad(benchmark, contender, name, 0.02, _CPU, "random")
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
    assert figures["case"] == f"{name}, 2 % random"
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
    with pytest.raises(
        AssertionError, match=r"^fishfast on conv3x3, 2 % random is wrong: .*; no figure$"
    ):
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
    with pytest.raises(
        AssertionError, match=r"^fishfast on conv3x3, 2 % random is wrong: .*; no figure$"
    ):
        _run(module, "fishfast", "conv3x3")
    assert capsys.readouterr().out == ""
    assert torch.equal(grad, before)


@pytest.mark.parametrize("contender", [_FLOOR, "fishfast"])
def test_flops_and_kept_bytes_are_counted(module: ModuleType, contender: str) -> None:
    dense = 2 * 8 * 24 * 16
    case = "linear 8 x 24 x 16"
    benchmark = SimpleNamespace(
        name="case", extra_info={}, pedantic=lambda call, args=(), **_: call(*args)
    )
    module.bench_masked_grad(benchmark, contender, case, 0.02, _CPU, "FISH")
    found = benchmark.extra_info
    assert found["flops"] == dense  # so small that the dense gradient is faster
    assert found["share_of_flops"] == 1
    assert 0 < found["share_of_matrix"] < 0.2
    assert found["kept_bytes"] == 8 * 16 * 4


def test_shares_of_rank_one_masks(module: ModuleType) -> None:
    """As of a real model's linear layers, and far below a random mask's."""
    import fishfast as ff

    shapes = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
    model = torch.nn.ModuleList([torch.nn.Linear(i, o, bias=False) for o, i in shapes])
    for density, low, high, of_random in ((0.001, 0.01, 0.04, 0.2), (0.005, 0.1, 0.18, 0.6)):
        share = module.compacted_share(module.rank_one_mask(model, density=density))
        assert low < share < high
        random = module.compacted_share(ff.random_mask(model, density=density, seed=0))
        assert random > of_random
