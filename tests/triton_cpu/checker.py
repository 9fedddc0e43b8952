"""Finds accesses out of bounds, and races between programs, in kernels that the interpreter runs.

- out of bounds: every address of every load and store lies in a tensor that the kernel was given;
- race: no address is stored by one program and touched by another;
- one store writes no address twice, whatever the mask;
- what a masked load leaves out is NaN, or a huge integer, unless the kernel says other=.

A GPU tells none of this: it reads the neighbour's memory, and the order of programs is its own.
Patches private names of Triton 3.9's interpreter; `install` refuses a Triton without them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from triton.runtime import interpreter

_native = interpreter._interpreter  # loads and stores, in C++
_current: Launch | None = None
num_checked = {"launches": 0, "loads": 0, "stores": 0}


class KernelFault(RuntimeError):
    """A kernel touched memory that it must not touch."""


@dataclass
class Launch:
    """What one launch may touch, and what its programs have touched."""

    name: str
    bounds: list[tuple[int, int]] = field(default_factory=list)
    addresses: list[np.ndarray] = field(default_factory=list)
    programs: list[int] = field(default_factory=list)
    stored: list[bool] = field(default_factory=list)

    def allow(self, argument) -> None:
        if isinstance(argument, tuple):
            for item in argument:
                self.allow(item)
        elif hasattr(argument, "data_ptr") and argument.numel():
            sizes = zip(argument.shape, argument.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in sizes)
            begin = argument.data_ptr()
            self.bounds.append((begin, begin + (last + 1) * argument.element_size()))

    def see(self, kind: str, pointers, mask, itemsize: int) -> None:
        pointers = np.asarray(pointers)
        mask = np.broadcast_to(np.asarray(mask, bool), pointers.shape)
        touched = pointers[mask].astype(np.uint64)
        num_checked[kind + "s"] += touched.size
        if not touched.size:
            return
        grid_index, grid = interpreter.interpreter_builder.grid_idx, self.grid()
        inside = np.zeros(touched.shape, bool)
        for begin, end in self.bounds:
            inside |= (touched >= begin) & (touched + np.uint64(itemsize) <= end)
        if not inside.all():
            raise KernelFault(
                f"{self.name}: {kind} of {itemsize} bytes out of bounds, program {grid_index}, "
                f"{self.distance(int(touched[~inside][0]))}"
            )
        distinct = np.unique(touched)
        if kind == "store" and distinct.size != touched.size:
            raise KernelFault(
                f"{self.name}: one store writes an address twice, program {grid_index}"
            )
        self.addresses.append(distinct)
        program = (grid_index[2] * grid[1] + grid_index[1]) * grid[0] + grid_index[0]
        self.programs.append(program)
        self.stored.append(kind == "store")

    @staticmethod
    def grid() -> tuple[int, int, int]:
        return interpreter.interpreter_builder.grid_dim

    def distance(self, address: int) -> str:
        begin, end = min(self.bounds, key=lambda b: min(abs(address - b[0]), abs(address - b[1])))
        return f"{address - begin:+d} bytes from the start of a tensor of {end - begin}"

    def find_races(self) -> None:
        if not self.addresses:
            return
        sizes = [len(a) for a in self.addresses]
        address = np.concatenate(self.addresses)
        program, stored = np.repeat(self.programs, sizes), np.repeat(self.stored, sizes)
        order = np.argsort(address, kind="stable")
        address, program, stored = address[order], program[order], stored[order]
        groups = np.flatnonzero(np.r_[True, address[1:] != address[:-1]])
        several = np.minimum.reduceat(program, groups) != np.maximum.reduceat(program, groups)
        racing = several & np.logical_or.reduceat(stored, groups)
        if racing.any():
            raise KernelFault(f"{self.name}: race between programs on {racing.sum()} addresses")


class _CheckedMemory:
    """Stands before the interpreter's memory; atomics are not ours, and refused."""

    def __getattr__(self, name: str):
        if name.startswith("atomic"):
            raise KernelFault(f"{name}: fishfast's kernels are deterministic, without atomics")
        return getattr(_native, name)

    @staticmethod
    def load(pointers, mask, other, dtype):
        if _current is not None:
            _current.see("load", pointers, mask, np.dtype(dtype).itemsize)
        return _native.load(pointers, mask, other, dtype)

    @staticmethod
    def store(pointers, values, mask):
        if _current is not None:
            _current.see("store", pointers, mask, values.dtype.itemsize)
        return _native.store(pointers, values, mask)


def _poison(shape, dtype) -> np.ndarray:
    if dtype.is_floating():
        bits = {16: 0x7FFF, 32: 0x7FFFFFFF, 64: 0x7FFFFFFFFFFFFFFF}[dtype.primitive_bitwidth]
        array = np.full(shape, bits, np.dtype(f"uint{dtype.primitive_bitwidth}"))
        return array.view(interpreter._get_np_dtype(dtype))
    numpy_dtype = interpreter._get_np_dtype(dtype)
    return np.full(shape, np.iinfo(numpy_dtype).max // 2, numpy_dtype)


def install() -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, to_host, load = executor.__call__, executor._init_args_hst, builder.create_masked_load
    interpreter._interpreter = _CheckedMemory()

    def checked_call(self, *args, **kwargs):
        global _current
        assert _current is None, "a kernel launches a kernel"
        _current = Launch(self.fn.__name__)
        num_checked["launches"] += 1
        try:
            call(self, *args, **kwargs)
            _current.find_races()
        finally:
            _current = None

    def checked_arguments(self, args, kwargs):
        on_host = to_host(self, args, kwargs)
        for argument in (*on_host[0], *on_host[1].values()):
            _current.allow(argument)
        return on_host

    def create_masked_load(self, pointers, mask, other, *options):
        if other is None:
            dtype = pointers.get_element_ty()
            other = interpreter.TensorHandle(_poison(pointers.data.shape, dtype), dtype)
        return load(self, pointers, mask, other, *options)

    executor.__call__, executor._init_args_hst = checked_call, checked_arguments
    builder.create_masked_load = create_masked_load
