"""The benchmark of the Fisher's primitives gives no figure for wrong squares, or for kept ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

_BENCH = Path(__file__).parents[1] / "bench"
_CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.setenv("FISHFAST_BENCH", "toy")
    monkeypatch.syspath_prepend(str(_BENCH))
    return importlib.import_module


def _token_squares(grad: Tensor, x: Tensor, score: Tensor) -> None:
    score += grad.flatten(0, 1).square().T @ x.flatten(0, 1).square()


def _overwrites(grad: Tensor, x: Tensor, score: Tensor) -> None:
    score.copy_((grad.mT @ x).square().sum(0))


def _kept_squares(grad: Tensor, x: Tensor, score: Tensor) -> None:
    score += _KEPT.setdefault(grad.data_ptr(), (grad.mT @ x).square().sum(0))


_KEPT: dict[int, Tensor] = {}


def _right_squares(grad: Tensor, x: Tensor, score: Tensor) -> None:
    score += (grad.mT @ x).square().sum(0)


@pytest.mark.parametrize("add", [_token_squares, _overwrites, _kept_squares, _right_squares])
def test_a_wrong_kernel_gets_no_figure(bench: Any, add: Any) -> None:
    grad, x = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    exact, before = (grad.double().mT @ x.double()).square().sum(0), grad.clone()
    case = bench("fisher_kernel_cases").KernelCase(
        title="linear 4x6", shape=(4, 6), grad=grad, floor=lambda: None, contenders={}, flops=0,
        num_bytes=0, exact=lambda: exact,
    )  # fmt: skip
    check, wrong = bench("bench_fisher_kernel").check, bench("fisher_reference").WrongScores
    arguments = ("planted", case, lambda score: add(grad, x, score), 1e-4, _CPU)
    if add is _right_squares:
        assert check(*arguments) < 1e-6
    else:
        with pytest.raises(wrong, match=r"planted is wrong on linear 4x6: .* no figure"):
            check(*arguments)
    assert torch.equal(grad, before)


def test_a_wrong_primitive_is_not_printed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module, name = bench("bench_fisher_kernel"), "linear-24x16-T4"
    case, dtype = module._made.__wrapped__(name, _CPU)
    case.contenders["fishfast"] = lambda score: score.add_(1)
    monkeypatch.setattr(module, "_made", lambda *_: (case, dtype))
    benchmark = SimpleNamespace(extra_info={})
    with pytest.raises(bench("fisher_reference").WrongScores, match="^fishfast is wrong on linear"):
        module.bench_kernel(benchmark, "fishfast", name, _CPU)
    assert capsys.readouterr().out == ""
    assert benchmark.extra_info == {}
