"""The benchmark of the optimizer step gives no figure for a wrong step, and counts its bytes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import fishfast as ff

_BENCH = Path(__file__).parents[1] / "bench"
_CPU = torch.device("cpu")
_CONTENDERS = [
    "fishfast",
    "torch fused on compact values + scatter",
    "torch fused, dense",
    "torch foreach, dense",
]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("FISHFAST_BENCH", "toy")
    monkeypatch.syspath_prepend(str(_BENCH))
    return importlib.import_module("bench_sparse_adam")


@pytest.fixture
def contenders(module: ModuleType) -> ModuleType:
    return importlib.import_module("adam_contenders")


def _run(module: ModuleType, contender: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    benchmark = SimpleNamespace(
        name="case", extra_info=figures, pedantic=lambda call, args=(), **_: call(*args)
    )
    module.bench_step(benchmark, contender, module.Problem(10_000, 0.005, 3, dtype), _CPU)
    return figures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("contender", _CONTENDERS)
def test_a_right_step_gets_a_line(
    module: ModuleType, contender: str, dtype: torch.dtype, capsys: Any
) -> None:
    figures = _run(module, contender, dtype)
    dense = "dense" in contender
    assert figures["num_selected"] == (10_000 if dense else 50)
    if dense:
        assert figures["bytes"] == 10_000 * 7 * dtype.itemsize
    if dtype == torch.float32:
        assert figures["relative_error"] < 1e-2  # of a step
    assert contender in capsys.readouterr().out


@pytest.mark.parametrize("contender", _CONTENDERS)
def test_another_learning_rate_gets_no_figure(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any,
    contender: str,
) -> None:  # fmt: skip
    build = contenders.CONTENDERS[contender]

    def wrong(model: Any, tuned: ff.SparseTuning) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(contenders, "_LR", 1.01e-3)
            return build(model, tuned)

    monkeypatch.setitem(contenders.CONTENDERS, contender, wrong)
    with pytest.raises(AssertionError, match=f"^{re.escape(contender)} on .* a weight is off by"):
        _run(module, contender)
    assert capsys.readouterr().out == ""


def test_no_first_moment_gets_no_figure(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, tuned: ff.SparseTuning) -> Any:
        step = contenders._fishfast(model, tuned)
        for p in tuned.parameters():
            p.grad = torch.ones_like(p)
        gradients = [p.grad for p in tuned.parameters()]
        run = ff.AdamW(tuned.parameters(), lr=1e-3, betas=(0.0, 0.999)).step
        return contenders.Step(run, step.weights, gradients, step.indices)

    monkeypatch.setitem(contenders.CONTENDERS, "fishfast", wrong)
    with pytest.raises(AssertionError, match="^fishfast on .*a weight is off by"):
        _run(module, "fishfast")


def test_a_write_outside_the_mask_gets_no_figure(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, tuned: ff.SparseTuning) -> Any:
        step = contenders._fishfast(model, tuned)
        weight, indices = step.weights[0], step.indices[0]
        outside = next(i for i in range(len(weight)) if i not in indices.tolist())

        def run() -> None:
            right()
            with torch.no_grad():  # by one ulp
                weight[outside] = torch.nextafter(weight[outside], torch.tensor(torch.inf))

        right, step.run = step.run, run
        return step

    monkeypatch.setitem(contenders.CONTENDERS, "fishfast", wrong)
    with pytest.raises(AssertionError, match="1 weights changed that do not train"):
        _run(module, "fishfast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("contender", ["fishfast", "torch fused, dense"])
def test_no_step_gets_no_figure(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch, contender: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    build = contenders.CONTENDERS[contender]

    def wrong(model: Any, tuned: ff.SparseTuning) -> Any:
        step = build(model, tuned)
        return contenders.Step(lambda: None, step.weights, step.gradients, step.indices)

    monkeypatch.setitem(contenders.CONTENDERS, contender, wrong)
    with pytest.raises(AssertionError, match="a weight is off by 1.27e-03"):
        _run(module, contender, dtype)


def test_what_is_wrong_only_at_the_timed_size_gets_no_figure(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, tuned: ff.SparseTuning) -> Any:
        step = contenders._fishfast(model, tuned)
        if sum(w.numel() for w in step.weights) == 50_000:
            step.run = lambda: None
        return step

    monkeypatch.setitem(contenders.CONTENDERS, "fishfast", wrong)
    problem = module.Problem(50_000, 0.005, 3, torch.float32)
    with pytest.raises(AssertionError, match="a weight is off by"):
        module.bench_step(SimpleNamespace(name="case"), "fishfast", problem, _CPU)


def test_a_step_on_too_few_weights_gets_no_figure(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        contenders.CONTENDERS, "fishfast", lambda *_: contenders.Step(lambda: None, [], [], [])
    )
    with pytest.raises(AssertionError, match="it steps 0 of 50 weights"):
        _run(module, "fishfast")


@pytest.mark.parametrize("contender", ["fishfast", "compiled on compact values + scatter"])
def test_some_tensors_may_have_no_masked_weight(
    module: ModuleType, contenders: ModuleType, contender: str
) -> None:
    problem = module.Problem(2000, 0.005, 40, torch.float32)
    model, tuned = module._tuned(problem, _CPU)
    assert len(list(tuned.parameters())) < 40
    module._check(contenders.CONTENDERS[contender](model, tuned), False, problem)


def test_a_compiler_that_fails_is_named(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(contenders, "_compiled_update", lambda: broken)
    with pytest.raises(pytest.skip.Exception, match="compiled.*RuntimeError: no compiler here"):
        _run(module, "compiled on compact values + scatter")


def test_bytes_of_the_floor(module: ModuleType) -> None:
    """At 0.5 % on a GPU: 32 bytes, and nearly a sector of 32 for each weight, which few share."""
    card = SimpleNamespace(type="cuda")
    for dtype, per_weight in ((torch.bfloat16, 62.8), (torch.float32, 63.4)):
        problem = module.Problem(10**8, 0.005, 16, dtype)
        assert problem.floor_bytes(card) / (0.005 * 10**8) == pytest.approx(per_weight, abs=0.1)
    everything = module.Problem(10**6, 1.0, 1, torch.float32)
    assert everything.floor_bytes(card) == (32 + 4) * 10**6
    assert everything.floor_bytes(_CPU) == (32 + 8) * 10**6  # read and written
