"""What runs where: the compiled extension is used when it is there, and missed loudly when not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import HANG_GUARD
from stepping import TORCH_HAS_FMA, CorrectSqrt
from torch import nn

import fishfast as ff
from fishfast import _backend

HERE = Path(__file__).parent
PACKAGE = Path(ff.__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EXTENSION = ff.build_info()["extension"]
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="fishfast._C is not compiled")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


# --- the extension under test ---


def problem_with(extension: str | None, package: Path) -> str:
    """Return why an extension is not the compiled one beside the package; empty if it is."""
    if extension is None:
        return "the compiled extension is missing: the tests would judge the torch path only"
    if Path(extension).resolve().parent != package.resolve():
        return f"the extension is {extension}, not the one beside {package}"
    return ""


@pytest.mark.skipif(
    os.environ.get("FISHFAST_REQUIRE_EXT") != "1",
    reason="FISHFAST_REQUIRE_EXT is not 1: a pure Python install may be tested",
)
def test_the_compiled_extension_is_under_test() -> None:
    problem = problem_with(EXTENSION, PACKAGE)
    assert not problem, problem
    assert ff.build_info()["operations"]["sparse_adam"]["cpu"] == "cpu"


def test_missing_or_foreign_extension_is_told() -> None:
    assert "is missing" in problem_with(None, PACKAGE)
    assert "not the one beside" in problem_with("/elsewhere/fishfast/_C.so", PACKAGE)
    assert problem_with(str(PACKAGE / "_C.so"), PACKAGE) == ""


# --- build_info ---


def test_build_info_tells_the_truth() -> None:
    info = ff.build_info()
    assert set(info) == {
        "version", "torch", "extension", "compiler", "nvcc", "cuda_archs", "unavailable",
        "operations",
    }  # fmt: skip
    assert info["version"] == ff.__version__
    assert info["torch"] == torch.__version__
    assert set(info["operations"]) == {
        "fisher", "topk_mask", "masked_grad", "sparse_adam", "sparse_sgd", "write_values",
    }  # fmt: skip
    for operation, by_device in info["operations"].items():
        assert set(by_device) == {"cpu", "cuda"}
        for backend in by_device.values():
            assert backend not in info["unavailable"], operation
        assert by_device["cpu"] in ("cpu", "torch")
    assert all(reason for reason in info["unavailable"].values())
    json.dumps(info)  # plain values, for a bug report


@needs_extension
def test_build_info_with_an_extension() -> None:
    info = ff.build_info()
    assert Path(info["extension"]).is_file()
    assert info["compiler"]
    assert "cpu" not in info["unavailable"]
    for operation in ("topk_mask", "masked_grad", "sparse_adam", "sparse_sgd", "write_values"):
        assert info["operations"][operation]["cpu"] == "cpu"
    assert (info["nvcc"] is None) == (info["cuda_archs"] is None)
    assert hasattr(_backend.compiled(), "sparse_adam_cuda") == (info["nvcc"] is not None)


@needs_no_gpu
def test_build_info_without_a_gpu() -> None:
    info = ff.build_info()
    assert {"cuda", "triton"} <= set(info["unavailable"])
    assert all(by_device["cuda"] == "torch" for by_device in info["operations"].values())
    if info["nvcc"] is not None and not Path("/proc/driver/nvidia").exists():
        assert info["unavailable"]["cuda"] == "no NVIDIA driver"


# --- choosing ---


@needs_extension
@pytest.mark.parametrize(
    "operation", ["topk_mask", "masked_grad", "sparse_adam", "sparse_sgd", "write_values"]
)
def test_auto_takes_the_compiled_path_silently(operation: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.choose(operation, CPU) == "cpu"
        assert _backend.choose(operation, CPU, "torch") == "torch"


@pytest.mark.parametrize("backend", ["cuda", "triton", "gpu", "", "CPU"])
def test_backend_that_an_operation_does_not_have(backend: str) -> None:
    message = rf"backend must be 'auto' or one of .* for sparse_adam on cpu; got '{backend}'"
    with pytest.raises(ValueError, match=message):
        _backend.choose("sparse_adam", CPU, backend)


@needs_no_gpu
def test_backend_asked_for_by_name_that_cannot_run() -> None:
    with pytest.raises(RuntimeError, match="backend 'cuda' was asked for but cannot run: ."):
        _backend.choose("sparse_adam", CUDA, "cuda")


def test_threads_are_those_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert _backend.num_threads(1e9) == before + 1
        assert _backend.num_threads(1e3) == 1
    finally:
        torch.set_num_threads(before)


# --- without the extension ---

WITHOUT = """
import json, sys, warnings
# An editable install's finder would find its own _C for this copy of the package.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fishfast as ff
    at_import = [str(w.message) for w in caught if "fishfast" in str(w.message)]
    assert not at_import, at_import
    from test_backend import results
    found = results()
    told = [str(w.message) for w in caught if "fishfast:" in str(w.message)]
import torch
from fishfast import _backend
try:
    _backend.choose("sparse_adam", torch.device("cpu"), "cpu")
except RuntimeError as error:
    by_name = str(error)
print(json.dumps([ff.__file__, found, told, ff.build_info(), by_name]))
"""


def results() -> dict[str, Any]:
    """Return bits of a mask and of weights trained by both optimizers, to compare processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))
    mask = ff.top_k_mask(ff.magnitude_scores(model), density=0.3)
    found: dict[str, Any] = {"mask": mask.fingerprint}
    data = torch.randn(16, 30)
    for make in (ff.AdamW, ff.SGD):
        tuned = ff.train_only(model, mask)
        optimizer = make(tuned.parameters(), lr=0.01)
        with CorrectSqrt():
            for _ in range(5):
                optimizer.zero_grad()
                model(data).square().sum().backward()
                optimizer.step()
        tuned.release()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        found[make.__name__] = weights.view(torch.int32).tolist()
    return found


def run_without_extension(folder: Path, broken: bytes | None) -> list[Any]:
    """Run `results` on a copy of the package that has no extension, or one that does not load."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, folder / "fishfast", ignore=ignored)
    if broken is not None:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        (folder / "fishfast" / f"_C{suffix}").write_bytes(broken)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(HERE)])},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANG_GUARD,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(None, "fishfast._C was not compiled"), (b"no library", "fishfast._C does not load: ")],
    ids=["missing", "broken"],
)
def test_without_the_extension_all_works_and_one_warning_tells(
    broken: bytes | None, reason: str, tmp_path: Path
) -> None:
    package, found, told, info, by_name = run_without_extension(tmp_path, broken)
    assert Path(package).parent == tmp_path / "fishfast"
    compiled = results()
    assert found["mask"] == compiled["mask"]
    if TORCH_HAS_FMA:
        assert found == compiled  # bit for bit
    assert found.keys() == compiled.keys()
    assert len(told) == 1, told
    assert reason in told[0]
    assert "'cpu' backend is not available" in told[0]
    assert "'torch' runs instead" in told[0]
    assert info["extension"] is None
    assert info["compiler"] is None
    assert reason in info["unavailable"]["cpu"]
    assert all(by_device["cpu"] == "torch" for by_device in info["operations"].values())
    assert "backend 'cpu' was asked for but cannot run: " in by_name
    assert reason in by_name


def test_the_warning_points_at_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_why_not", lambda name, _="": "" if name == "torch" else "off")
    _backend._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="'torch' runs instead") as told:
        ff.top_k_mask({"w": torch.rand(5)}, k=2)
    assert told[0].filename == __file__
    _backend._warn_once.cache_clear()
