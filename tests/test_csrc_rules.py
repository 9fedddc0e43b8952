"""The rules that let one CUDA source run on a card and on the simulator, enforced by reading.

csrc_rules.py has the rules. Each is shown to hold for csrc/, and to notice a source that breaks it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from csrc_rules import (
    block_index_where_blocks_wait,
    contractible_products,
    device_code_outside_kernels,
    foreign_includes,
    functions,
    inexact_flags,
    machine_dependent_words,
    polled_atomics,
    returns_before_a_collective,
    uneven_blocks,
)
from simt.build import CSRC
from simt.mutants import blank_comments

_TEXTS = {
    path.name: path.read_text()
    for path in sorted(CSRC.iterdir())
    if path.suffix in {".cu", ".cuh", ".h", ".cpp"}
}
_KERNELS = {
    name: text
    for name, text in _TEXTS.items()
    if name.endswith((".cu", ".cuh")) and name != "platform.cuh"
}
_HEADERS = {  # of kernels: those of CPU threads only are parallel.h and cpu_step.h
    name: text
    for name, text in _TEXTS.items()
    if any(f'#include "{name}"' in kernel for kernel in _KERNELS.values()) and name.endswith(".h")
}
_CMAKE = (CSRC.parent / "CMakeLists.txt").read_text()


def _ids(texts: dict[str, str]) -> dict:
    return {"argvalues": texts.values(), "ids": texts.keys()}


# --- csrc/ obeys ---


def test_the_folder_was_read() -> None:
    assert {
        "sparse_adam.cu",
        "sparse_sgd.cu",
        "topk_mask.cu",
        "ordered_scan.cuh",
    } <= _KERNELS.keys()
    assert {"sparse_adam.h", "scatter.h", "launch.h"} <= _HEADERS.keys()
    found = {function.name for text in _KERNELS.values() for function in functions(text)}
    assert {"sparse_adam_kernel", "sum_before_tile", "compact", "emit"} <= found


@pytest.mark.parametrize("text", **_ids({**_KERNELS, **_HEADERS}))
def test_machine_dependent_words_are_in_platform_cuh(text: str) -> None:
    assert machine_dependent_words(text) == []
    assert machine_dependent_words(_TEXTS["platform.cuh"])


@pytest.mark.parametrize("text", **_ids({**_KERNELS, **_HEADERS}))
def test_kernels_include_neither_cuda_nor_torch(text: str) -> None:
    assert foreign_includes(text) == []


@pytest.mark.parametrize("name", _TEXTS)
def test_no_torch_and_pybind11_in_one_file(name: str) -> None:
    assert not [word for word in foreign_includes(_TEXTS[name]) if not word.endswith("cuda")]
    assert ("pybind11" in blank_comments(_TEXTS[name])) == (name == "bindings.cpp")


@pytest.mark.parametrize("name", sorted(_TEXTS.keys() - _KERNELS.keys() - {"platform.cuh"}))
def test_device_code_is_in_kernel_files(name: str) -> None:
    assert device_code_outside_kernels(_TEXTS[name]) == []


@pytest.mark.parametrize("text", **_ids(_KERNELS))
def test_blocks_are_whole_warps_and_flags_are_acquired(text: str) -> None:
    headers = "".join(header for name, header in _KERNELS.items() if name.endswith(".cuh"))
    assert uneven_blocks(text, headers) == []
    assert polled_atomics(text) == []


def test_blocks_that_wait_for_others_do_not_number_tiles_by_block() -> None:
    assert block_index_where_blocks_wait(_KERNELS) == []


def test_no_thread_returns_before_a_collective() -> None:
    assert returns_before_a_collective(_KERNELS) == []


@pytest.mark.parametrize("text", **_ids(_HEADERS))
def test_shared_arithmetic_has_no_bare_products(text: str) -> None:
    assert contractible_products(text) == []


def test_compiler_flags_keep_the_rounding() -> None:
    assert inexact_flags(_CMAKE, _KERNELS) == []


# --- and each rule notices ---


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (machine_dependent_words, "kernel<<<1, 32>>>(x);", "x << 3;  // kernel<<<1, 32>>>(x)"),
        (machine_dependent_words, "__shared__ int x[32];", "FF_SHARED(int, x, [32]);"),
        (machine_dependent_words, 'asm("ret;");', "int asm_count;"),
        (machine_dependent_words, "volatile int* flag;", "/* volatile */ int* flag;"),
        (machine_dependent_words, "f(__activemask());", "f(kAllLanes);"),
        (machine_dependent_words, "cudaLaunchKernel(f);", "FF_LAUNCH(f);"),
        (machine_dependent_words, "cooperative_groups::sync(g);", "__syncthreads();"),
        (machine_dependent_words, "__atomic_load_n(p, 0);", "ld_acquire(p);"),
        (foreign_includes, "#include <cub/cub.cuh>", '#include "platform.cuh"  // not <cub'),
        (foreign_includes, "#include <cuda_runtime.h>", "#include <cstdint>"),
        (foreign_includes, "#include <torch/extension.h>", "#include <vector>"),
        (foreign_includes, "#include <cooperative_groups.h>", "#include <string>"),
        (device_code_outside_kernels, "int t = threadIdx.x;", "int thread_index;"),
        (device_code_outside_kernels, "__threadfence();", "// __threadfence();"),
        (polled_atomics, "while (atomicAdd(f, 0) == 0) {}", "while (x) { atomicAdd(f, 1); }"),
        (polled_atomics, "while (atomicCAS(f, 0, 1)) {}", "while (ld_acquire(f) == 0) {}"),
        (
            uneven_blocks,
            "constexpr int kThreads = 100;\nFF_LAUNCH(f, 1, kThreads, 0, s, x);",
            "constexpr int kWarps = 3;\nFF_LAUNCH(f<1>, 1, dim3(kWarps * 32), 0, s, x);",
        ),
        (uneven_blocks, "FF_LAUNCH((f<1, 2>), 1, threads, 0, s);", "FF_LAUNCH(f, 1, 96, 0, s);"),
        (
            contractible_products,
            '#include "rounding.h"\nfloat f(float a, float b) { return a * b + a; }',
            '#include "rounding.h"\nfloat f(float* a, float b) { return mul_rn(*a, b); }',
        ),
        (
            contractible_products,
            '#include "rounding.h"\nvoid f(float& a) {\n  a *= 2.0f;\n}',
            '#include "storage.h"\nfloat f(float a, float b) { return a * b + a; }',
        ),
    ],
)
def test_rule_notices(rule: Callable[[str], list[str]], bad: str, good: str) -> None:
    assert len(rule(bad)) == 1
    assert rule(good) == []


_WAITER = """\
__device__ int wait_for(unsigned* flags, int64_t tile) {
  while (ld_acquire(&flags[tile]) == 0) {
  }
  return 0;
}
"""


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        ("int64_t tile = blockIdx.x; wait_for(f, tile);", ["kernel"]),
        ("int64_t tile = atomicAdd(f, 1u); wait_for(f, tile);", []),
        ("f[blockIdx.x] = 0;", []),
    ],
)
def test_rule_notices_a_tile_that_is_a_block_index(kernel: str, found: list[str]) -> None:
    texts = {
        "scan.cuh": _WAITER,
        "a.cu": f"__global__ void kernel(unsigned* f) {{\n  {kernel}\n}}\n",
    }
    assert block_index_where_blocks_wait(texts) == found


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("if (threadIdx.x > 3) return;\n__syncthreads();", [2]),
        ("if (x) return;  // the whole block\n__syncthreads();", []),
        ("if (x) return;\nif (y) return;\nhelper(1);", [2, 3]),
        ("__syncthreads();\nif (x) return;\ny = 1;", []),
        ("for (;;) {\n__syncthreads();\nif (x) return;\n}", [4]),
        ("for (;;) {\nif (x) return;\n}", []),
        ("const auto f = [&](int i) { return i; };\n__syncwarp();", []),
        ("return __shfl_sync(m, x, 0);", []),
        ("if (x) return 0;\nreturn __shfl_sync(m, x, 0);", [2]),
    ],
)
def test_rule_notices_a_return_before_a_collective(body: str, lines: list[int]) -> None:
    helper = "__device__ void helper(int x) {\n  __syncwarp();\n}\n"
    texts = {"a.cu": f"__global__ void kernel(int x) {{\n{body}\n}}\n", "b.cuh": helper}
    assert returns_before_a_collective(texts) == [f"a.cu:{line}" for line in lines]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("-ffp-contract=off)", ")"),
        ("-ffp-contract=off)", "-ffp-contract=fast)"),
        ("-O3 ", "-Ofast "),
        ("-O3 ", "-O3 -ffast-math "),
        ("--compress-mode=size", "--use_fast_math"),
        ("--compress-mode=size", "--fmad=true"),
        ("${FISHFAST_CXX_FLAGS}", "-O3"),
        ("csrc/fisher_linear_cpu.cpp PROPERTIES", "csrc/topk_mask_cpu.cpp PROPERTIES"),
    ],
)
def test_rule_notices_an_inexact_flag(old: str, new: str) -> None:
    assert old in _CMAKE
    assert inexact_flags(_CMAKE.replace(old, new), _KERNELS)
