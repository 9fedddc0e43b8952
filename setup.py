"""Builds fishfast._C through CMake and ninja; pure Python when the machine has no C++ compiler.

Switches (environment):
    FISHFAST_CUDA=auto|on|off   auto (default): CUDA when nvcc works; on: a missing nvcc is fatal.
    FISHFAST_CUDA_ARCHS=80,90   what nvcc compiles for; default: chosen by the compiler's version.
    FISHFAST_REQUIRE_EXT=1      no compiler is an error, not a pure Python install.
    FISHFAST_BUILD_DIR=DIR      where CMake builds; kept, the next build compiles what has changed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

NO_COMPILER = """
************************************************************************************************
* fishfast: NO C++ COMPILER FOUND (looked for $CXX, c++, g++, clang++).                         *
* Installing the PURE PYTHON package: same masks, same steps to an ulp, but several times        *
* slower. Install g++ and reinstall to get the compiled extension.                              *
************************************************************************************************
"""


def find_cxx() -> str | None:
    """Return the C++ compiler that CMake would take, or None."""
    wanted = os.environ.get("CXX")
    candidates = [wanted] if wanted else ["c++", "g++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    """Return the path of nvcc: decided by the compiler, never by a live GPU."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*"))
    candidates[1:1] = [str(Path(home) / "bin" / "nvcc") for home in homes[:2] if home]
    candidates += [str(Path(home) / "bin" / "nvcc") for home in homes[2:] if home]
    return next((path for path in candidates if path and shutil.which(path)), None)


def configure_build(
    cmake: str, build: Path, options: list[str], environment: dict[str, str]
) -> None:
    """Run CMake's first step; once more from nothing where the last build's cache is in the way.

    pip builds in an environment of its own, which is gone when it installs from the same checkout
    again: the cache still names the ninja that was in it. So it is when a checkout has been moved.
    """
    again = (build / "CMakeCache.txt").exists()
    command = [cmake, "-B", str(build), *options]
    done = subprocess.run(command, check=not again, env=environment)
    if done.returncode != 0:
        print("fishfast: once more, without the last build's cache", file=sys.stderr, flush=True)
        subprocess.run([*command, "--fresh"], check=True, env=environment)


class CMakeBuild(build_ext):
    """Runs CMake for the one extension that CMakeLists.txt describes."""

    def run(self) -> None:
        """Build, or say loudly that this install is pure Python."""
        if find_cxx() is None:
            if os.environ.get("FISHFAST_REQUIRE_EXT") == "1":
                sys.exit(
                    "fishfast: FISHFAST_REQUIRE_EXT=1, but no C++ compiler was found" + NO_COMPILER
                )
            print(NO_COMPILER, file=sys.stderr, flush=True)
            self.extensions.clear()
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Configure and build; a compile error is always fatal."""
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(os.environ.get("FISHFAST_BUILD_DIR") or self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # A virtual environment that is used without being activated has cmake and ninja there.
        scripts = str(Path(sys.executable).parent)
        environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
        cuda = os.environ.get("FISHFAST_CUDA", "auto").lower()
        if cuda not in ("auto", "on", "off"):
            sys.exit(f"fishfast: FISHFAST_CUDA must be auto, on or off; got {cuda!r}")
        if cuda != "off" and (nvcc := find_nvcc()):
            environment["CUDACXX"] = nvcc
        configure = [
            "-S", str(ROOT), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DFISHFAST_CUDA={cuda}",
            # ';' would split the list inside -D, so architectures travel with commas.
            f"-DFISHFAST_CUDA_ARCHS={os.environ.get('FISHFAST_CUDA_ARCHS', '').replace(';', ',')}",
        ]  # fmt: skip
        cmake = shutil.which("cmake", path=environment["PATH"])
        if cmake is None:
            sys.exit("fishfast: cmake was not found; pip install cmake ninja pybind11")
        configure_build(cmake, build, configure, environment)
        subprocess.run([cmake, "--build", str(build)], check=True, env=environment)


# optional stays False: only a missing compiler makes a pure Python install, a broken build fails.
setup(ext_modules=[Extension("fishfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
