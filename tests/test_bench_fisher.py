"""The Fisher benchmarks refuse figures of wrong scores, and skip peers by name with the reason."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

_BENCH = Path(__file__).parents[1] / "bench"
_CPU = torch.device("cpu")

# What a peer cannot score, and a piece of the reason. Everything else, if it is installed, agrees
# with the loop.
_UNSUPPORTED = {
    ("Opacus", "resnet"): "BatchNorm2d",
    ("BackPACK", "bert"): "no rule for LayerNorm",
    ("BackPACK", "llama"): "no rule for LlamaRMSNorm",
    ("BackPACK", "resnet"): "modified inplace",
}


class _Benchmark:
    """Stands for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, call: Any, args: Any = (), rounds: int = 1) -> Any:
        self.rounds += rounds
        return call(*args)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a module of bench/ at toy size."""
    monkeypatch.setenv("FISHFAST_BENCH", "toy")
    monkeypatch.syspath_prepend(str(_BENCH))

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        assert Path(module.__file__ or "").parent == _BENCH
        return module

    return load


@pytest.fixture
def workload(bench: Any) -> Any:
    """A workload that nothing was measured on yet."""
    return dataclasses.replace(bench("fisher_models").load("convnet", _CPU))


def test_the_floor_runs_every_batch(bench: Any, workload: Any) -> None:
    seen = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        seen.append(batch)
        return workload.loss_fn(model, batch)

    counted = dataclasses.replace(workload, loss_fn=loss_fn)
    found = bench("fisher_baselines").forward_backward(counted)()
    assert len(workload.batches) > 1
    assert all(a is b for a, b in zip(seen, workload.batches, strict=True))
    assert set(found) == {name for name, _ in workload.model.named_parameters()}


def _square_of_the_batch(workload: Any) -> dict[str, Tensor]:
    """The commonest mistake."""
    scores = {name: torch.zeros_like(p) for name, p in workload.model.named_parameters()}
    for batch in workload.batches:
        workload.model.zero_grad()
        workload.loss_fn(workload.model, batch).sum().backward()
        for name, p in workload.model.named_parameters():
            scores[name] += p.grad.square()
    return scores


def _right(workload: Any) -> dict[str, Tensor]:
    from fisher_baselines import CONTENDERS

    return dict(CONTENDERS["batch-1 loop"].build(workload)())


def _two_percent_off(workload: Any) -> dict[str, Tensor]:
    return {name: 1.02 * values for name, values in _right(workload).items()}


def _one_forgotten(workload: Any) -> dict[str, Tensor]:
    return {name: values for name, values in _right(workload).items() if name != "0.bias"}


def _one_nan(workload: Any) -> dict[str, Tensor]:
    scores = _right(workload)
    scores["0.bias"][0] = torch.nan
    return scores


def _one_zeroed(workload: Any) -> dict[str, Tensor]:
    scores = _right(workload)
    _zero_one(scores["8.weight"], 0.9)  # 25,600 entries: their norm stays
    return scores


def _zero_one(values: Tensor, quantile: float) -> None:
    flat = values.view(-1)
    flat[flat.argsort()[int(quantile * len(flat))]] = 0


def _plant(bench: Any, monkeypatch: pytest.MonkeyPatch, name: str, score: Any) -> None:
    baselines = bench("fisher_baselines")
    planted = dataclasses.replace(
        baselines.CONTENDERS[name], build=lambda workload: lambda: score(workload)
    )
    monkeypatch.setitem(baselines.CONTENDERS, name, planted)


@pytest.mark.parametrize("contender", ["fishfast", "torch.func vmap"])
@pytest.mark.parametrize(
    "wrong", [_square_of_the_batch, _two_percent_off, _one_forgotten, _one_nan, _one_zeroed]
)
def test_a_wrong_contender_gets_no_figure(
    bench: Any, workload: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, contender: str,
    wrong: Any,
) -> None:  # fmt: skip
    _plant(bench, monkeypatch, contender, wrong)
    benchmark = _Benchmark()
    with pytest.raises(
        bench("fisher_reference").WrongScores, match=rf"^{contender} (is wrong|gave no scores)"
    ):
        bench("bench_fisher").score_and_record(benchmark, contender, workload)
    assert capsys.readouterr().out == ""
    assert (benchmark.extra_info, benchmark.rounds) == ({}, 0)


def test_no_ratio_to_wrong_scores(
    bench: Any, workload: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _plant(bench, monkeypatch, "fishfast", _square_of_the_batch)
    with pytest.raises(bench("fisher_reference").WrongScores, match="^fishfast is wrong"):
        bench("bench_fisher").score_and_record(_Benchmark(), "batch-1 loop", workload)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("contender", ["forward + backward", "fishfast", "batch-1 loop"])
def test_the_floor_is_checked(
    bench: Any, workload: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, contender: str
) -> None:
    bench_fisher = bench("bench_fisher")
    monkeypatch.setattr(bench_fisher, "forward_backward", lambda _: lambda: {})
    with pytest.raises(bench("fisher_reference").WrongScores, match="backward gave no scores"):
        bench_fisher.score_and_record(_Benchmark(), contender, workload)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("contender", ["fishfast", "torch.func vmap"])
def test_kept_scores_get_no_figure(
    bench: Any, workload: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, contender: str
) -> None:
    _plant(bench, monkeypatch, contender, functools.cache(_right))
    images = workload.batches[0]["pixel_values"]
    before = images.clone()
    with pytest.raises(
        bench("fisher_reference").WrongScores, match=f"^{contender} is wrong .* called again"
    ):
        bench("bench_fisher").score_and_record(_Benchmark(), contender, workload)
    assert capsys.readouterr().out == ""
    assert torch.equal(images, before)


def test_one_entry_counts_in_bf16_too(bench: Any) -> None:
    """There the loop in bf16 tells how much rounding makes."""
    pytest.importorskip("transformers", reason="the Llama is that of transformers: not installed")
    sizes = {**bench("shapes").FISHER_MODELS["toy"]["llama"], "layers": 1, "batches": 1}
    workload = bench("fisher_models").build("llama", _CPU, torch.bfloat16, **sizes)
    reference = bench("fisher_reference")
    _, scores = bench("fisher_baselines").prepare("fishfast", workload)
    assert reference.check("fishfast", workload, scores) < 0.02
    _zero_one(scores["model.layers.0.mlp.up_proj.weight"], 0.5)
    with pytest.raises(reference.WrongScores, match="an entry of '.*up_proj.weight' differs"):
        reference.check("fishfast", workload, scores)


@pytest.mark.parametrize("contender", ["forward + backward", "fishfast", "batch-1 loop"])
def test_a_right_contender_gets_a_line(
    bench: Any, workload: Any, capsys: Any, contender: str
) -> None:
    benchmark = _Benchmark()
    bench("bench_fisher").score_and_record(benchmark, contender, workload)
    line = capsys.readouterr().out
    assert line.startswith(f"{contender} ")
    for unit in ("ms/sample", "x floor", "x fishfast", "MiB"):
        assert unit in line
    figures = benchmark.extra_info
    assert figures["relative_error"] < 1e-5
    weights = sum(p.nbytes for p in workload.model.parameters())
    assert figures["peak_bytes"] > 1.5 * weights  # the weights and something as large beside them
    samples = workload if contender == "fishfast" else workload.head
    assert figures["num_samples"] == samples.num_samples
    # The last layer alone: forward, its input's and its weight's gradient.
    last = workload.model[-1].weight.numel()
    assert figures["flops"] > 3 * 2 * last * figures["num_samples"]
    assert figures["bytes"] > 2 * weights


@pytest.mark.parametrize("peer", ["torch.func vmap", "Opacus", "BackPACK"])
@pytest.mark.parametrize("model", ["bert", "llama", "resnet", "convnet"])
# Theirs: how they hook modules.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_peer_agrees_or_says_why_not(bench: Any, model: str, peer: str) -> None:
    baselines = bench("fisher_baselines")
    package = baselines.CONTENDERS[peer].package
    if bench("harness").version(package) is None:
        pytest.skip(f"{package} is not installed")
    workload = bench("fisher_models").load(model, _CPU)
    if (peer, model) in _UNSUPPORTED:
        with pytest.raises(baselines.Unavailable, match=_UNSUPPORTED[peer, model]):
            baselines.prepare(peer, workload)
    else:
        _, scores = baselines.prepare(peer, workload)
        assert bench("fisher_reference").check(peer, workload, scores) < 1e-5


def test_a_small_vit_is_scored(bench: Any) -> None:
    """On a GPU it is ViT-L; no smaller set has one."""
    pytest.importorskip("transformers", reason="the models are those of transformers")
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "side": 32, "batch_size": 2, "batches": 2}
    workload = bench("fisher_models").build("vit", _CPU, torch.float32, **sizes)
    baselines = bench("fisher_baselines")
    _, scores = baselines.prepare("fishfast", workload)
    assert bench("fisher_reference").check("fishfast", workload, scores) < 1e-5
    assert workload.title == "ViT 1x16 32px B=2 fp32"


def test_a_peer_that_is_not_installed_is_skipped_by_name(
    bench: Any, workload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    benchmark = _Benchmark()
    with pytest.raises(pytest.skip.Exception, match="^Opacus.* on convnet .*: not installed"):
        bench("bench_fisher").score_and_record(benchmark, "Opacus", workload)
    assert benchmark.extra_info == {}


def test_our_own_failure_is_no_skip(
    bench: Any, workload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> Any:
        raise NotImplementedError("planted")

    _plant(bench, monkeypatch, "fishfast", broken)
    with pytest.raises(NotImplementedError, match="planted"):
        bench("bench_fisher").score_and_record(_Benchmark(), "fishfast", workload)


def test_a_wrong_score_is_not_on_a_sweep(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("transformers", reason="the BERT is that of transformers: not installed")
    _plant(bench, monkeypatch, "fishfast", _square_of_the_batch)
    benchmark = _Benchmark()
    with pytest.raises(bench("fisher_reference").WrongScores, match="^fishfast is wrong on BERT"):
        bench("bench_fisher_sweep").bench_sweep(benchmark, "fishfast", 4, 2, _CPU)
    assert capsys.readouterr().out == ""
    assert (benchmark.extra_info, benchmark.rounds) == ({}, 0)


def test_peak_memory_counts_what_is_held_at_once(bench: Any) -> None:
    def two_of_three() -> None:
        first = torch.ones(2**18)
        second = torch.ones(2**18)
        del first
        torch.ones(2**18) + second[0]

    peak = bench("harness").peak_bytes(two_of_three, _CPU)
    assert peak == pytest.approx(3 * 2**20, abs=2**10)  # MiB: second, the third, and their sum


def test_flops_are_two_for_each_product(bench: Any) -> None:
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    assert bench("harness").count_flops(lambda: left @ right) == 2 * 3 * 5 * 7


def test_sizes_have_four_names(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = bench("harness")
    assert not harness.full_size()
    monkeypatch.setenv("FISHFAST_BENCH", "large")
    with pytest.raises(ValueError, match="^FISHFAST_BENCH must be one of .*; got 'large'$"):
        harness.full_size()


def test_a_further_batch_that_took_less_than_nothing_has_no_figure(
    bench: Any, workload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a difference of two times, which a busy machine may turn round."""
    module, benchmark = bench("bench_fisher"), _Benchmark()
    real = module._timed_fishfast
    monkeypatch.setattr(module, "_timed_fishfast", lambda *given: (real(*given)[0], -0.5))
    module.score_and_record(benchmark, "fishfast", workload)
    assert "us_per_sample" in benchmark.extra_info
    assert "times_floor_further" not in benchmark.extra_info
