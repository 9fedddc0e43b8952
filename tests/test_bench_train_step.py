"""The benchmark of a training step refuses what trains wrongly, and names who cannot run."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

_BENCH = Path(__file__).parents[1] / "bench"
_CPU = torch.device("cpu")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setenv("FISHFAST_BENCH", "toy")
    monkeypatch.syspath_prepend(str(_BENCH))
    return importlib.import_module("bench_train_step")


@pytest.fixture
def contenders(module: ModuleType) -> ModuleType:
    return importlib.import_module("train_contenders")


def _run(module: ModuleType, contender: str, case: str = "bert") -> dict[str, Any]:
    figures: dict[str, Any] = {}
    benchmark = SimpleNamespace(
        name="case", extra_info=figures, pedantic=lambda call, args=(), **_: call(*args)
    )
    module.train_and_record(benchmark, contender, case, _CPU)
    return figures


def _plant(
    contenders: ModuleType, monkeypatch: pytest.MonkeyPatch, contender: str, change: Any
) -> None:
    """Change what a contender builds."""
    right = contenders.CONTENDERS[contender]

    def build(workload: Any, budget: Any, masks: Any) -> Any:
        training = right.build(workload, budget, masks)
        change(training, dict(workload.model.named_parameters()))
        return training

    monkeypatch.setitem(contenders.CONTENDERS, contender, dataclasses.replace(right, build=build))


def _ulp_elsewhere(training: Any, weights: dict[str, Any]) -> None:
    """One step writes past the mask, into a LayerNorm that no other weight's gradient shows."""
    step, weight = (
        training.optimizer.step,
        next(p for p in weights.values() if not p.requires_grad and p.dim() == 1),
    )

    def wrong() -> None:
        step()
        weight.copy_(torch.nextafter(weight, torch.tensor(torch.inf)))

    training.optimizer.step = torch.no_grad()(wrong)


def _other_entries(training: Any, weights: dict[str, Any]) -> None:
    """The gradients of neighbours: right in size and number."""

    def shift() -> None:
        for p in training.parameters:
            p.grad = p.grad.roll(1)

    training.mask_gradients = shift


def _larger_steps(training: Any, weights: dict[str, Any]) -> None:
    training.optimizer.param_groups[0]["lr"] *= 1.5


def _larger_second_step(training: Any, weights: dict[str, Any]) -> None:
    step = training.optimizer.step

    def wrong() -> None:
        step()
        training.optimizer.param_groups[0]["lr"] = 1.5e-4

    training.optimizer.step = wrong


def _slightly_larger_steps(training: Any, weights: dict[str, Any]) -> None:
    training.optimizer.param_groups[0]["lr"] *= 1.01


def _one_weight_left_out(training: Any, weights: dict[str, Any]) -> None:
    step, target = training.optimizer.step, training.parameters[0].target
    first = target.weight().view(-1)[target.indices[:1]].clone()

    def wrong() -> None:
        step()
        target.weight().view(-1)[target.indices[:1]] = first

    training.optimizer.step = torch.no_grad()(wrong)


def _no_steps(training: Any, weights: dict[str, Any]) -> None:
    training.optimizer.step = lambda: None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_ulp_elsewhere, "changed [0-9]+ weights of '.*' that it does not train"),
        (_other_entries, "gradients have a relative error of"),
        (_larger_steps, "its first step is off by 0.5 of the learning rate"),
        (_larger_second_step, "its loss is"),
        (_slightly_larger_steps, "[0-9]+ trained weights of '.*' are off by up to 0.02 steps"),
        (_one_weight_left_out, "1 trained weights of '.*' are off by up to"),
        (_no_steps, "it does not train ([0-9]+) of \\1 parameters"),
    ],
)
def test_a_wrong_step_gets_no_figure(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any,
    change: Any, reason: str,
) -> None:  # fmt: skip
    _plant(contenders, monkeypatch, "fishfast", change)
    with pytest.raises(AssertionError, match=f"^fishfast on BERT .* is wrong: .*{reason}"):
        _run(module, "fishfast")
    assert capsys.readouterr().out == ""


def test_adapters_must_leave_the_base_alone(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")

    def decay_the_base(training: Any, weights: dict[str, Any]) -> None:
        step = training.optimizer.step

        def wrong() -> None:
            step()
            weights["bert.pooler.dense.base_layer.weight"].mul_(0.99)

        training.optimizer.step = torch.no_grad()(wrong)

    _plant(contenders, monkeypatch, "LoRA all-linear", decay_the_base)
    with pytest.raises(AssertionError, match="changed 1024 weights of 'bert.pooler.dense.weight'"):
        _run(module, "LoRA all-linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("contender", ["full fine-tuning", "LoRA all-linear", "SHiRA"])
def test_the_first_step_is_the_learning_rate(
    module: ModuleType, contenders: ModuleType, contender: str, dtype: torch.dtype
) -> None:
    """These have no reference. In bf16, as on a GPU, rounding hides a step next to most weights."""
    if contender != "full fine-tuning":
        pytest.importorskip("peft")
    check = importlib.import_module("train_reference").check
    budget, masks, *_ = module._prepared("bert", _CPU)
    for factor in (1, 0.9):
        workload = module.build("bert", _CPU, dtype, **module._CASES["bert"], batches=1)
        weights = dict(workload.model.named_parameters())
        training = contenders.prepare(contender, workload, budget, masks)
        training.optimizer.param_groups[0]["lr"] *= factor
        if factor == 1:
            check(training, weights, None)
        else:
            with pytest.raises(AssertionError, match="its first step is off by 0.1 of the learn"):
                check(training, weights, None)


def _no_work(training: Any) -> None:
    training.step = lambda: None


def _no_gradient_of_one(training: Any) -> None:
    training.parameters[3].requires_grad_(False)


def _gradients_of_half_a_loss(training: Any) -> None:
    loss = training.loss
    training.loss = lambda: loss() / 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_no_work, r"it computed no gradient of ([0-9]+) of \1 parameters"),
        (_no_gradient_of_one, "it computed no gradient of 1 of"),
        (_gradients_of_half_a_loss, "its gradients have a relative error of 5.00e-01"),
    ],
)
def test_no_ratio_to_a_wrong_floor(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch, change: Any,
    reason: str,
) -> None:  # fmt: skip
    _plant(contenders, monkeypatch, "forward + backward", lambda training, _: change(training))
    module._floor.cache_clear()
    with pytest.raises(
        AssertionError, match=rf"^forward \+ backward on BERT .* is wrong: {reason}"
    ):
        module._floor("bert", _CPU)


def test_full_fine_tuning_must_train_every_parameter(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_one(training: Any, weights: dict[str, Any]) -> None:
        training.optimizer.param_groups[0]["params"].pop()

    _plant(contenders, monkeypatch, "full fine-tuning", forget_one)
    with pytest.raises(AssertionError, match="it does not train 1 of [0-9]+ parameters"):
        _run(module, "full fine-tuning")


@pytest.mark.parametrize(
    ("case", "contender"),
    [
        ("bert", "fishfast"),
        ("bert", "dense masked AdamW"),
        ("bert", "forward + backward"),
        ("llama", "fishfast, random mask"),
    ],
)
def test_a_right_contender_gets_a_line(
    module: ModuleType, contender: str, case: str, capsys: Any
) -> None:
    figures = _run(module, contender, case)
    assert contender in capsys.readouterr().out
    assert figures["times_floor"] > 0
    weights = 4 * figures["num_params"]
    assert weights < figures["total_bytes"] < 12 * weights
    masked = contender != "forward + backward"
    assert (figures["num_selected"] < figures["num_params"]) == masked
    assert ("relative_error" in figures) == masked
    if contender.startswith("fishfast"):
        assert figures["percent_saved"] > 50


@pytest.mark.parametrize("case", ["bert", "llama"])
def test_as_many_weights_train(module: ModuleType, contenders: ModuleType, case: str) -> None:
    """LoRA's number is PEFT's own; queries and values alone come as near as a rank can."""
    pytest.importorskip("peft")
    budget, masks, *_ = module._prepared(case, _CPU)
    trained = {
        name: contenders.prepare(name, module._make(case, _CPU), budget, masks).num_trained
        for name in ("fishfast", "LoRA all-linear", "LoRA on queries and values", "SHiRA")
    }
    assert trained["fishfast"] == trained["LoRA all-linear"] == budget.num_selected
    assert 0.9 * budget.num_selected < trained["SHiRA"] <= budget.num_selected
    assert trained["LoRA on queries and values"] == pytest.approx(budget.num_selected, rel=0.2)


def test_memory_at_rest_counts_each_storage_once(module: ModuleType) -> None:
    before = module.resident_bytes(_CPU)
    kept = torch.zeros(1000)
    views = [kept[:10], kept.view(10, 100)]
    assert module.resident_bytes(_CPU) - before == 4000
    del kept, views
    assert module.resident_bytes(_CPU) == before


def test_a_missing_package_is_named(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(pytest.skip.Exception, match="^SHiRA on BERT .*: not installed"):
        _run(module, "SHiRA")


def test_our_own_failure_is_no_skip(
    module: ModuleType, contenders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise NotImplementedError("planted")

    _plant(contenders, monkeypatch, "fishfast", broken)
    with pytest.raises(NotImplementedError, match="planted"):
        _run(module, "fishfast")
