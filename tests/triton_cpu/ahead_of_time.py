"""Compile kernels for GPUs that are not there, exactly as a launch would, and read what they use.

`record` runs a primitive with the kernel replaced by a recorder, so that the arguments are those of
real launches, whatever the heuristics choose. `compile_launch` specialises them as Triton does: by
type, by divisibility by 16, and ones are constants. Needs neither driver nor card.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """One specialisation of a kernel: what `triton.compile` needs, picklable and hashable."""

    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    divisible: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, Any], ...]


class Usage(NamedTuple):
    """What the assembler says of a compiled kernel."""

    launch: Launch
    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str


class _Recorder:
    """Takes a kernel's place in its module."""

    def __init__(self, module: str, name: str, kernel) -> None:
        self.module, self.name, self.kernel = module, name, kernel
        self.launches: list[Launch] = []

    def __getitem__(self, grid):
        assert all(0 < size < 2**31 for size in grid)
        assert all(size < 2**16 for size in grid[1:])
        return self._launch

    def _launch(self, **arguments) -> None:
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        assert set(arguments) == set(self.kernel.arg_names)
        signature, constants, divisible = {}, {}, []
        for position, parameter in enumerate(self.kernel.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[position,] = value
            else:
                signature[parameter.name] = _specialise(
                    (position,), value, not parameter.do_not_specialize, constants, divisible
                )
        self.launches.append(
            Launch(
                self.module,
                self.name,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple(divisible),
                tuple(options.items()),
            )
        )


def _specialise(path, value, specialise, constants, divisible):
    if isinstance(value, tuple):
        return tuple(
            _specialise((*path, i), item, specialise, constants, divisible)
            for i, item in enumerate(value)
        )
    if isinstance(value, torch.Tensor):
        if value.data_ptr() % 16 == 0:
            divisible.append(path)
        return _TYPES[value.dtype]
    if specialise and value == 1:
        constants[path] = 1
        return "constexpr"
    if specialise and value % 16 == 0:
        divisible.append(path)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def record(kernels: list[tuple[ModuleType, str]], primitive, *args) -> list[Launch]:
    """Return the launches that ``primitive(*args)`` makes of kernels, named with their modules."""
    recorders = [
        _Recorder(module.__name__, name, getattr(module, name)) for module, name in kernels
    ]
    for (module, name), recorder in zip(kernels, recorders, strict=True):
        setattr(module, name, recorder)
    try:
        primitive(*args)
    finally:
        for (module, name), recorder in zip(kernels, recorders, strict=True):
            setattr(module, name, recorder.kernel)
    return [launch for recorder in recorders for launch in recorder.launches]


def compile_launch(job: tuple[Launch, int]) -> Usage:
    """Compile for one architecture, and read what the cubin says of itself."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch, architecture = job
    source = ASTSource(
        fn=getattr(importlib.import_module(launch.module), launch.kernel),
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={path: [["tt.divisibility", 16]] for path in launch.divisible},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options)
    )
    # Spilled registers live on the stack, and nothing else of ours does. Asked of the cubin: Triton
    # assembles with options of its own, and a cubin may come from its cache.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    shared = compiled.metadata.shared
    return Usage(launch, architecture, int(registers), int(stack), shared, compiled.asm["ptx"])


def compile_all(jobs: list[tuple[Launch, int]]) -> list[Usage]:
    """Compile launches for architectures, in as many processes as there are cores."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_launch, jobs))
