"""The top-k benchmark runs from toy sizes on, and gives no figure for a wrong mask."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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
    return SimpleNamespace(name="case", extra_info={}, pedantic=lambda run, **_: run())


@pytest.mark.parametrize("contender", ["fishfast", "torch.topk"])
def test_a_right_mask_gets_a_line(module: ModuleType, contender: str, capsys: Any) -> None:
    benchmark = _benchmark()
    module.bench_top_k(benchmark, contender, "one bin", 0.005, 3, _CPU)
    assert benchmark.extra_info["bytes"] == 4 * 2**16  # one read
    assert "GB/s" in capsys.readouterr().out


def test_a_wrong_mask_gets_no_figure(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Right but for ties, which go to the highest index."""

    def wrong(scores: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
        flipped = {name: score.flip(0) for name, score in reversed(scores.items())}
        mask = right(flipped, k=k)
        return {n: (len(s) - 1 - mask[n]).flip(0) for n, s in scores.items()}

    right = ff.top_k_mask
    monkeypatch.setattr(ff, "top_k_mask", wrong)
    benchmark = _benchmark()
    with pytest.raises(AssertionError):
        module.bench_top_k(benchmark, "fishfast", "all equal", 0.005, 3, _CPU)
    assert benchmark.extra_info == {}
    assert capsys.readouterr().out == ""
    module.bench_top_k(benchmark, "fishfast", "lognormal", 0.005, 3, _CPU)  # no ties at the edge
