"""Compile kernel sources with g++ against the SIMT runtime into a shared library.

By hand::

    python tests/simt/build.py OUT.so --mode asan csrc/foo.cu tests/simt/foo_api.cpp
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
RUNTIME_SOURCES = ("fiber.cpp", "launch.cpp", "scheduler.cpp", "collectives.cpp", "api.cpp")
MODES = ("plain", "asan", "tsan")

COMMON_FLAGS = (
    "-std=c++17",
    "-g",
    "-fPIC",
    "-Wall",
    "-Wno-unknown-pragmas",  # #pragma unroll is nvcc's
    "-DFF_SIM",
    "-ffp-contract=off",  # the card fuses only where the source says __fmaf_rn
    "-fno-gnu-unique",  # two libraries in one process share no statics
)
KERNEL_FLAGS = {
    "plain": ("-O3",),
    "asan": (
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ),
    "tsan": ("-O1", "-fsanitize=thread"),
}
# Under TSan the runtime stays uninstrumented and reports the CUDA threads' order itself.
RUNTIME_FLAGS = {**KERNEL_FLAGS, "plain": ("-O2",), "tsan": ("-O2", "-DSIMT_TSAN")}
LINK_FLAGS = {
    "plain": (),
    "asan": ("-fsanitize=address,undefined",),
    "tsan": ("-fsanitize=thread",),
}


def build(
    kernel_sources: Sequence[str | Path],
    out: str | Path,
    mode: str = "plain",
    defines: Sequence[str] = (),
) -> Path:
    """Compile `.cu` and `.cpp` files for the CPU and link them with the SIMT runtime.

    Args:
        kernel_sources: Kernel files and the `extern "C"` functions that Python calls.
        out: The shared library to write.
        mode: "plain", "asan" (AddressSanitizer and UBSan) or "tsan" (ThreadSanitizer).
        defines: Macros, "NAME" or "NAME=VALUE", for the kernel sources and the runtime.

    Returns:
        The path of the library.

    Raises:
        ValueError: If the mode is not one of the three.
        RuntimeError: If the compiler fails; its message is in the text.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    out = Path(out)
    common = [*COMMON_FLAGS, *_fused_multiply_add_flag(), f"-I{HERE}", f"-I{CSRC}"]
    common += [f"-D{define}" for define in defines]
    with tempfile.TemporaryDirectory() as folder:
        # As one file the runtime compiles in half the time: its headers are most of the work.
        runtime = Path(folder, "runtime.cpp")
        runtime.write_text("".join(f'#include "{name}"\n' for name in RUNTIME_SOURCES))
        # It comes first: of an inline function compiled twice the linker keeps the first, which has
        # to be the uninstrumented one.
        jobs = [(runtime, RUNTIME_FLAGS[mode])]
        jobs += [(Path(source), KERNEL_FLAGS[mode]) for source in kernel_sources]
        objects = [str(Path(folder, f"{i}_{job[0].stem}.o")) for i, job in enumerate(jobs)]

        def compile_one(i: int) -> None:
            source, flags = jobs[i]
            _run([compiler(), *common, *flags, "-x", "c++", "-c", str(source), "-o", objects[i]])

        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, range(len(jobs))))
        _run([compiler(), "-shared", *LINK_FLAGS[mode], *objects, "-o", str(out), "-pthread"])
    return out


def compiler() -> str:
    """Return the C++ compiler: the environment's CXX, else g++."""
    return os.environ.get("CXX", "g++")


def _fused_multiply_add_flag() -> list[str]:
    # Without the instruction __fmaf_rn calls libm: the same bits, slower.
    if platform.machine() != "x86_64":
        return []
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return ["-mfma"] if "fma" in flags else []


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    if result.stderr:
        print(result.stderr)


def main() -> None:
    """Build from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--mode", choices=MODES, default="plain")
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME[=VALUE]")
    arguments = parser.parse_args()
    build(arguments.sources, arguments.out, arguments.mode, arguments.defines)


if __name__ == "__main__":
    main()
