"""Repairs bf16 in Triton's interpreter, which multiplies its bits as integers and truncates casts.

bf16 is held as uint16. Arithmetic on it goes through fp32 here, as on a GPU; casts round to
nearest, ties to even. Patches private names of Triton 3.9; `install` refuses a Triton without them.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def to_fp32(handle):
    if not is_bf16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << np.uint32(16)
    return interpreter.TensorHandle(bits.view(np.float32).reshape(handle.data.shape), tl.float32)


def to_bf16(values: np.ndarray):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    half = np.where(is_nan, np.uint32(0x7FC0), rounded >> np.uint32(16)).astype(np.uint16)
    return interpreter.TensorHandle(half.reshape(np.shape(values)), tl.bfloat16)


def install() -> None:
    builder = interpreter.InterpreterBuilder
    missing = [
        name
        for name in ("create_dot", "cast_impl", "binary_op", "create_fp_ext", "create_fp_trunc")
        if not hasattr(builder, name)
    ]
    if missing:
        raise RuntimeError(
            f"Triton's interpreter has changed, adapt tests/triton_cpu: no {missing}"
        )
    dot, cast, binary = builder.create_dot, builder.cast_impl, builder.binary_op

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        return dot(self, to_fp32(a), to_fp32(b), acc, input_precision, max_num_imprecise_acc)

    def cast_impl(self, source, dtype):
        if is_bf16(source) and dtype.scalar == tl.float32:
            return to_fp32(source)
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return to_bf16(source.data)
        return cast(self, source, dtype)

    def binary_op(self, left, right, op):
        if not (is_bf16(left) and is_bf16(right)):
            return binary(self, left, right, op)
        result = op(to_fp32(left).data, to_fp32(right).data)
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return to_bf16(result)

    builder.create_dot, builder.cast_impl, builder.binary_op = create_dot, cast_impl, binary_op
    # These call cast_impl of the class in which they were defined.
    builder.create_fp_ext = builder.create_fp_trunc = lambda self, s, d: cast_impl(self, s, d)
