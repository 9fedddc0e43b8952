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
    out = Path(out)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(None, Path(folder, "runtime.o"))]
        jobs += [(Path(source), Path(folder, f"{i}.o")) for i, source in enumerate(kernel_sources)]

        def compile_one(job: tuple[Path | None, Path]) -> Path:
            source, object_file = job
            if source is None:
                return compile_runtime(object_file, mode, defines)
            return compile_kernel(source, object_file, mode, defines)

        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            return link(list(pool.map(compile_one, jobs)), out, mode)


def compile_kernel(
    source: Path,
    object_file: Path,
    mode: str = "plain",
    defines: Sequence[str] = (),
    more_flags: Sequence[str] = (),
) -> Path:
    """Compile one `.cu` or `.cpp` file; returns the object file.

    Headers are looked for beside the source first, then in csrc/.
    """
    _check_mode(mode)
    return _compile(source, object_file, [*KERNEL_FLAGS[mode], *more_flags], defines)


def compile_runtime(object_file: Path, mode: str = "plain", defines: Sequence[str] = ()) -> Path:
    """Compile the runtime; returns the object file."""
    _check_mode(mode)
    # As one file the runtime compiles in half the time: its headers are most of the work.
    source = object_file.with_suffix(".cpp")
    source.write_text("".join(f'#include "{name}"\n' for name in RUNTIME_SOURCES))
    return _compile(source, object_file, RUNTIME_FLAGS[mode], defines)


def link(objects: Sequence[Path], out: Path, mode: str = "plain") -> Path:
    """Link a library; returns its path.

    The runtime's object comes first: of an inline function compiled twice the linker keeps the
    first, which has to be the uninstrumented one.
    """
    files = [str(path) for path in objects]
    _run([compiler(), "-shared", *LINK_FLAGS[mode], *files, "-o", str(out), "-pthread"])
    return out


def compiler() -> str:
    """Return the C++ compiler: the environment's CXX, else g++."""
    return os.environ.get("CXX", "g++")


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")


def _compile(source: Path, object_file: Path, flags: Sequence[str], defines: Sequence[str]) -> Path:
    common = [*COMMON_FLAGS, *_fused_multiply_add_flag(), f"-I{HERE}", f"-I{CSRC}"]
    common += [f"-D{define}" for define in defines]
    _run([compiler(), *common, *flags, "-x", "c++", "-c", str(source), "-o", str(object_file)])
    return object_file


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
