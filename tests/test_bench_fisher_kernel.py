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


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    _KEPT.clear()  # memory is used again, at the same address


_KEPT: dict[int, Tensor] = {}


def _right_squares(grad: Tensor, x: Tensor, score: Tensor) -> None:
    score += (grad.mT @ x).square().sum(0)


@pytest.mark.parametrize("add", [_token_squares, _overwrites, _kept_squares, _right_squares])
def test_a_wrong_kernel_gets_no_figure(bench: Any, add: Any) -> None:
    grad, x = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    before = grad.clone()
    case = _case(bench, grad, x, floor=lambda: (grad.mT @ x).sum(0))
    check, wrong = bench("bench_fisher_kernel").check, bench("fisher_reference").WrongScores
    arguments = ("planted", case, lambda score: add(grad, x, score), 1e-4, _CPU)
    if add is _right_squares:
        assert check(*arguments) < 1e-6
    else:
        with pytest.raises(wrong, match=r"planted is wrong on linear 4x6: .* no figure"):
            check(*arguments)
    assert torch.equal(grad, before)


@pytest.mark.parametrize(
    "floor",
    [
        lambda grad, x: grad[-1].T @ x[-1],
        lambda grad, x: (grad.mT @ x).square().sum(0),
        lambda grad, x: _KEPT.setdefault(grad.data_ptr(), (grad.mT @ x).sum(0)),
    ],
    ids=["last sample", "squares", "kept"],
)
def test_no_figure_against_a_wrong_floor(bench: Any, floor: Any) -> None:
    grad, x = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    case = _case(bench, grad, x, floor=lambda: floor(grad, x))
    with pytest.raises(bench("fisher_reference").WrongScores, match="the floor is wrong on linear"):
        bench("bench_fisher_kernel").check(
            "right", case, lambda score: _right_squares(grad, x, score), 1e-4, _CPU
        )


def _case(bench: Any, grad: Tensor, x: Tensor, floor: Any) -> Any:
    per_sample = grad.double().mT @ x.double()
    return bench("fisher_kernel_cases").KernelCase(
        title="linear 4x6", shape=(4, 6), grad=grad, floor=floor, contenders={}, flops=0,
        num_bytes=0, exact=lambda: (per_sample.square().sum(0), per_sample.sum(0)),
    )  # fmt: skip


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
