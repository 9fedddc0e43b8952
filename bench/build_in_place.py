"""Compiles fishfast._C beside the package with nvcc and g++ alone, for a machine without network.

    python bench/build_in_place.py 90        # the card's compute capability

`pip install -e .` needs setuptools, pybind11, cmake and ninja; this needs the two compilers and
torch, whose headers have pybind11 among them. It builds what CMakeLists.txt describes, and links
fishfast/kernels to kernels/, as an installation would.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = ["build", "compile_commands", "pybind11_headers"]

_ROOT = Path(__file__).resolve().parents[1]


def pybind11_headers() -> Path:
    """Return the folder that holds ``pybind11/pybind11.h``: its own package's, or torch's.

    Raises:
        FileNotFoundError: neither has it.
    """
    for package in ("pybind11", "torch"):
        found = importlib.util.find_spec(package)  # imports nothing
        folder = Path(str(found.origin)).parent / "include" if found else Path("/nowhere")
        if (folder / "pybind11" / "pybind11.h").is_file():
            return folder
    raise FileNotFoundError("no pybind11 headers: neither pybind11 nor torch is installed")


def build(arch: str, root: Path = _ROOT) -> Path:
    """Compile and link.

    Args:
        arch: compute capability of the card, such as "90".
        root: the repository.

    Returns:
        The extension.

    Raises:
        FileNotFoundError: no nvcc, or no pybind11.
        subprocess.CalledProcessError: a compiler refused something; it has said what.
    """
    nvcc = _nvcc()
    out = root / "build" / "in_place"
    out.mkdir(parents=True, exist_ok=True)
    commands = compile_commands(nvcc, arch, root)
    objects = [str(out / f"{source.name}.o") for source in commands]
    full = [[*c, "-o", o] for c, o in zip(commands.values(), objects, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), full))

    extension = root / "fishfast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = [nvcc, "-shared", "-cudart=static", *objects, "-o", str(out / extension.name)]
    subprocess.run(link, check=True)
    (out / extension.name).replace(extension)
    kernels = root / "fishfast" / "kernels"
    if not kernels.exists():
        kernels.symlink_to(Path("..", "kernels"))
    return extension


def compile_commands(nvcc: str, arch: str, root: Path = _ROOT) -> dict[Path, list[str]]:
    """Return source -> what compiles it, all but where the object goes; as CMakeLists.txt would.

    Args:
        nvcc: the compiler.
        arch: of `build`.
        root: the repository.
    """
    version = re.search(r"release ([\d.]+)", _output(nvcc, "--version"))
    assert version is not None
    # nvcc hands .cpp files to the host's compiler, with the folder of CUDA's headers.
    compiler = [
        nvcc, "-O3", "-std=c++17", "-w",
        f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]",
        *(f"-I{folder}" for folder in (sysconfig.get_path("include"), pybind11_headers())),
        "-DFISHFAST_WITH_CUDA", f'-DFISHFAST_CUDA_ARCHS="{arch}"',
        f'-DFISHFAST_NVCC_VERSION="{version[1]}"',
    ]  # fmt: skip
    # Those whose sums no other device repeats; everywhere else the source asks for each fused one.
    described = (root / "CMakeLists.txt").read_text()
    fused = re.findall(r"(\w+\.cpp) PROPERTIES COMPILE_OPTIONS -ffp-contract=fast", described)
    commands = {}
    for source in sorted([*root.glob("csrc/*.cpp"), *root.glob("csrc/*.cu")]):
        contract = "fast" if source.name in fused else "off"
        host = f"-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract={contract}"
        commands[source] = [*compiler, host, "-c", str(source)]
    return commands


def _nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    named = [os.environ.get("CUDACXX", ""), "nvcc", *(f"{h}/bin/nvcc" for h in homes if h)]
    found = next((path for name in named if name and (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError("no nvcc in CUDACXX, on the PATH, in CUDA_HOME or /usr/local/cuda")
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    print(build(sys.argv[1]))
