"""CUB's DeviceTopK as a baseline: it builds where its headers and nvcc are, and says what lacks."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

_BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def cub_topk(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(_BENCH))
    module = importlib.import_module("cub_topk")
    monkeypatch.delenv("FISHFAST_CUB_TOPK", raising=False)
    module.headers.cache_clear()
    yield module
    module.headers.cache_clear()


def test_missing_headers_are_named(
    cub_topk: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FISHFAST_CCCL", str(tmp_path))
    assert "FISHFAST_CCCL" in str(cub_topk.unavailable())
    with pytest.raises(RuntimeError, match="no CCCL headers with cub/device/device_topk.cuh"):
        cub_topk.build("sm_90", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_compiler_is_named(
    cub_topk: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    header = tmp_path / "cub" / "device" / "device_topk.cuh"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.setenv("FISHFAST_CCCL", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cub_topk.headers() == tmp_path
    assert cub_topk.unavailable() == "no nvcc on the PATH"


def test_a_library_from_elsewhere(
    cub_topk: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither headers nor nvcc are needed."""
    library = tmp_path / "cub_topk.so"
    monkeypatch.setenv("FISHFAST_CUB_TOPK", str(library))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cub_topk.unavailable() == f"FISHFAST_CUB_TOPK names no file: {library}"
    library.touch()
    assert cub_topk.unavailable() is None
    assert cub_topk.build("sm_90", tmp_path / "out") == library


def test_it_builds_for_hopper(cub_topk: ModuleType, tmp_path: Path) -> None:
    if reason := cub_topk.unavailable():
        pytest.skip(reason)
    library = cub_topk.build("sm_90", tmp_path)
    assert cub_topk.build("sm_90", tmp_path) == library  # not twice
    assert [library] == list(tmp_path.iterdir())
    loaded = cub_topk.load(library)
    assert [int(part) >= 0 for part in cub_topk.cccl_version(loaded).split(".")] == [True] * 3
    entry, num_bytes = loaded.fishfast_bench_cub_topk, ctypes.c_size_t(0)
    if not torch.cuda.is_available():  # the answer comes from the CUDA runtime in it
        assert entry(0, None, ctypes.byref(num_bytes), None, None, None, 1000, 10, None) != 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_selects_the_largest(cub_topk: ModuleType, dtype: torch.dtype) -> None:
    if reason := cub_topk.unavailable():
        pytest.skip(reason)
    scores = torch.rand(100_003, device="cuda").to(dtype)
    found = cub_topk.top_k(scores, 1000)
    assert len(found.unique()) == 1000
    selected = scores[found.long()].sort(descending=True).values
    assert torch.equal(selected, scores.sort(descending=True).values[:1000])
