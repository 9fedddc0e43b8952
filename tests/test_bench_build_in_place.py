"""bench/build_in_place.py: what nvcc alone builds can be imported, and is what CMake builds."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from build_in_place import build, compile_commands  # noqa: E402

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

# Python's own interface: pybind11 takes seconds to compile.
BINDINGS = """
#include <Python.h>
int kernels();
static PyObject* told(PyObject*, PyObject*) {
  return Py_BuildValue("iss", kernels(), FISHFAST_CUDA_ARCHS, FISHFAST_NVCC_VERSION);
}
static PyMethodDef methods[] = {{"told", told, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
KERNEL = """
__global__ void kernel(int* out) { *out = 1; }
int kernels() {
  cudaFuncAttributes found;
  (void)cudaFuncGetAttributes(&found, kernel);  // whatever it finds: there may be no card
  return 1;
}
"""


@needs_nvcc
def test_what_it_builds_can_be_imported(tmp_path: Path) -> None:
    for room in ("csrc", "fishfast", "kernels"):
        (tmp_path / room).mkdir()
    (tmp_path / "csrc" / "bindings.cpp").write_text(BINDINGS)
    (tmp_path / "csrc" / "kernel.cu").write_text(KERNEL)
    (tmp_path / "CMakeLists.txt").touch()
    extension = build("90", tmp_path)
    assert (tmp_path / "fishfast" / "kernels").samefile(tmp_path / "kernels")
    spec = importlib.util.spec_from_file_location("_C", extension)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels, archs, version = module.told()
    assert (kernels, archs) == (1, "90")
    assert re.fullmatch(r"\d+\.\d+", version)


def test_flags_and_sources_are_those_of_cmake(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0,\n")
    nvcc.chmod(0o755)
    commands = compile_commands(str(nvcc), "90")
    described = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    sources = set(re.findall(r"csrc/\w+\.(?:cpp|cu)\b", described))
    assert {f"csrc/{source.name}" for source in commands} == sources
    flags = re.search(r"FISHFAST_CXX_FLAGS (.*)\)", described)
    assert flags is not None
    common = {flag for flag in flags[1].split() if not flag.startswith(("-W", "-ffp-contract"))}
    common.add(f"-std=c++{re.search(r'CMAKE_CXX_STANDARD (..)', described)[1]}")
    assert f"-std=c++{re.search(r'CMAKE_CUDA_STANDARD (..)', described)[1]}" in common
    named = set(re.findall(r"FISHFAST_\w+", described.split("target_compile_definitions")[1]))
    own = dict(re.findall(r"csrc/(\w+\.\w+) PROPERTIES COMPILE_OPTIONS (\S+)\)", described))
    usual = next(flag for flag in flags[1].split() if flag.startswith("-ffp-contract"))
    for source, command in commands.items():
        assert common <= set(command)
        defined = {flag[2:].split("=")[0] for flag in command if flag.startswith("-D")}
        assert defined == named
        (host,) = (flag for flag in command if flag.startswith("-Xcompiler="))
        assert own.get(source.name, usual) in host.split(",")
