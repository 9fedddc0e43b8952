"""The top-k benchmark runs from toy sizes on, and gives no figure for a wrong selection."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fishfast as ff

_BENCH = Path(__file__).parents[1] / "bench"
_CPU = torch.device("cpu")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("FISHFAST_BENCH", "toy")
    monkeypatch.syspath_prepend(str(_BENCH))
    return importlib.import_module("bench_topk_mask")


def _benchmark() -> Any:
    return SimpleNamespace(
        name="case", extra_info={}, pedantic=lambda call, args=(), **_: call(*args)
    )


def _run(module: ModuleType, contender: str, values: str, **options: Any) -> dict[str, Any]:
    benchmark = _benchmark()
    problem = module.Problem(values, 2**16, num_tensors=3, **options)
    module.bench_top_k(benchmark, contender, problem, _CPU)
    return benchmark.extra_info


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("values", ["lognormal", "all equal", "mostly zero", "one bin"])
@pytest.mark.parametrize("contender", ["fishfast", "torch.topk"])
def test_a_right_selection_gets_a_line(
    module: ModuleType, contender: str, values: str, dtype: torch.dtype, capsys: Any
) -> None:
    figures = _run(module, contender, values, dtype=dtype)
    assert figures["bytes"] == dtype.itemsize * 2**16  # one read
    assert figures["num_selected"] == int(0.005 * 2**16)
    assert "GB/s" in capsys.readouterr().out


@pytest.mark.parametrize("at_least", [0, 2**16], ids=["always", "at the timed size"])
@pytest.mark.parametrize("values", ["all equal", "mostly zero"])
def test_a_wrong_mask_gets_no_figure(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, values: str, at_least: int
) -> None:
    """Right but for ties, which go to the highest index."""

    def wrong(scores: dict[str, torch.Tensor], k: int) -> ff.SparseMask:
        if sum(len(score) for score in scores.values()) < at_least:
            return right(scores, k=k)
        flipped = {name: score.flip(0) for name, score in reversed(scores.items())}
        mask = right(flipped, k=k)
        indices = {n: (len(s) - 1 - mask[n]).flip(0) for n, s in scores.items()}
        return ff.SparseMask(indices, {n: tuple(s.shape) for n, s in scores.items()})

    right = ff.top_k_mask
    monkeypatch.setattr(ff, "top_k_mask", wrong)
    benchmark = _benchmark()
    # Of 0.005 the threshold of "mostly zero" is a value of its own; 0.5 reaches the zeros.
    problem = module.Problem(values, 2**16, density=0.5, num_tensors=3)
    with pytest.raises(AssertionError, match=rf"^fishfast on {values}.* not what a stable sort"):
        module.bench_top_k(benchmark, "fishfast", problem, _CPU)
    assert benchmark.extra_info == {}
    assert capsys.readouterr().out == ""


def test_ties_are_the_first_of_a_stable_sort(module: ModuleType) -> None:
    """Any other choice among equal scores is refused, at the end of a tensor and of the next."""
    scores = {"a": torch.tensor([2.0, 1, 1, 3]), "b": torch.tensor([1.0, 0, 1])}
    shapes, check = {"a": (4,), "b": (3,)}, importlib.import_module("topk_reference").check
    values = torch.cat([*scores.values()])
    accepted = []
    for chosen in itertools.combinations(range(7), 4):
        indices = {"a": [i for i in chosen if i < 4], "b": [i - 4 for i in chosen if i >= 4]}
        mask = ff.SparseMask({n: torch.tensor(i, dtype=torch.int32) for n, i in indices.items()},
                             shapes)  # fmt: skip
        with contextlib.suppress(AssertionError):
            check(mask, scores, 4)
            accepted.append(list(chosen))
    order = values.sort(descending=True, stable=True).indices[:4]
    assert accepted == [order.sort().values.tolist()]


@pytest.mark.parametrize("contender", ["fishfast", "torch.topk"])
@pytest.mark.parametrize("values", ["lognormal", "all equal"])
def test_a_kept_selection_gets_no_figure(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, contender: str, values: str
) -> None:
    right, kept = module._CONTENDERS[contender], {}

    def wrong(scores: dict[str, torch.Tensor], k: int) -> Any:
        return kept.setdefault((scores["t0"].data_ptr(), k), right(scores, k))

    monkeypatch.setitem(module._CONTENDERS, contender, wrong)
    with pytest.raises(AssertionError, match=rf"^{contender} on {values}.*: not the largest"):
        _run(module, contender, values)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda found: torch.cat([found[1:], found[-1:]]), "not k different scores"),
        (lambda found: torch.cat([found[1:], torch.tensor([0])]), "not the largest scores"),
    ],
    ids=["twice", "small"],
)
def test_a_wrong_baseline_gets_no_figure(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, spoil: Any, reason: str
) -> None:
    right = module._CONTENDERS["torch.topk"]
    monkeypatch.setitem(
        module._CONTENDERS, "torch.topk", lambda scores, k: spoil(right(scores, k).sort().values)
    )
    with pytest.raises(AssertionError, match=rf"^torch.topk on one bin.*{reason}"):
        _run(module, "torch.topk", "one bin")


def test_what_is_wrong_only_at_full_size_gets_no_figure(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module._CONTENDERS["torch.topk"]

    def wrong(scores: dict[str, torch.Tensor], k: int) -> torch.Tensor:
        found = right(scores, k)
        return found if sum(len(s) for s in scores.values()) <= 50_000 else found % 60_000

    monkeypatch.setitem(module._CONTENDERS, "torch.topk", wrong)
    with pytest.raises(AssertionError, match="^torch.topk on lognormal.* is wrong: not "):
        _run(module, "torch.topk", "lognormal")


def test_ties_are_free_to_a_baseline(module: ModuleType) -> None:
    scores = {"a": torch.ones(300), "b": torch.ones(200)}
    importlib.import_module("topk_reference").check(torch.arange(500).flip(0)[:7], scores, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cub_is_skipped_by_name(module: ModuleType) -> None:
    with pytest.raises(pytest.skip.Exception, match="CUB DeviceTopK.* needs a GPU"):
        _run(module, "CUB DeviceTopK", "lognormal")


def test_memory_of_the_process_counts_what_torch_does_not_allocate(module: ModuleType) -> None:
    size = 2**26
    found = module.resident_beyond(lambda: np.ones(size, dtype=np.uint8))
    if found is None:
        pytest.skip("this system does not say what a process holds")
    assert found == pytest.approx(size, abs=2**22)  # Linux counts pages in batches
    assert module.resident_beyond(lambda: None) < 2**22


def test_models_have_their_number_of_weights(module: ModuleType) -> None:
    shapes = importlib.import_module("shapes")
    known = {  # as published with the models
        "ResNet-50": (25_557_032, 161), "BERT-base": (109_482_240, 199),
        "BERT-large": (335_141_888, 391), "ViT-L": (304_326_632, 392),
        "Llama 1B": (1_100_048_384, 201), "Llama 8B": (8_030_261_248, 291),
    }  # fmt: skip
    found = {name: shapes.parameter_sizes(name) for name in shapes.MODELS}
    assert {name: (sum(sizes), len(sizes)) for name, sizes in found.items()} == known


def test_scores_of_a_model_and_of_many_tensors(module: ModuleType) -> None:
    problem = module._of_model("ResNet-50")
    assert str(problem) == "lognormal, ResNet-50, n=25,557,032, 0.5 %, 161 tensors, fp32"
    many = module._scores.__wrapped__(module.Problem("all equal", 10**5, num_tensors=10_000), _CPU)
    sizes = [len(score) for score in many.values()]
    assert (len(sizes), sum(sizes), min(sizes)) == (10_000, 10**5, 1)


@pytest.mark.parametrize(
    ("number", "name"), [(10**7, "1e7"), (5 * 10**5, "5e5"), (2**25, "2^25"), (123_456, "123,456")]
)
def test_titles_say_numbers_exactly(module: ModuleType, number: int, name: str) -> None:
    assert importlib.import_module("shapes").count(number) == name
