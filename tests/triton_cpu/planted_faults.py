"""Kernels with one fault each, and one without: the checker must tell them apart."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy_kernel(out_ptr, x_ptr, size, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    if FAULT == "unmasked load":
        value = tl.load(x_ptr + i)
    elif FAULT == "guard off by one":
        value = tl.load(x_ptr + i, mask=i <= size, other=0.0)
    elif FAULT == "load before the start":
        value = tl.load(x_ptr + i - 1, mask=inside, other=0.0)
    else:
        value = tl.load(x_ptr + i, mask=inside, other=0.0)
    if FAULT == "unmasked store":
        tl.store(out_ptr + i, value)
    elif FAULT == "programs store to one address":
        tl.store(out_ptr + i % BLOCK, value, mask=inside)
    elif FAULT == "reads what another program stores":
        tl.store(out_ptr + i, value + tl.load(out_ptr + size - 1 - i, mask=inside), mask=inside)
    elif FAULT == "one store writes an address twice":
        tl.store(out_ptr + i // 2, value, mask=inside)
    elif FAULT == "atomic add":
        tl.atomic_add(out_ptr + i, value, mask=inside)
    else:
        tl.store(out_ptr + i, value, mask=inside)


def copy(out, x, fault):
    _copy_kernel[(triton.cdiv(len(x), 16),)](out, x, len(x), fault, 16)


@triton.jit
def _sum_kernel(out_ptr, x_ptr, size, HAS_OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if HAS_OTHER:
        x = tl.load(x_ptr + i, mask=i < size, other=0)
    else:
        x = tl.load(x_ptr + i, mask=i < size)
    tl.store(out_ptr, tl.sum(x.to(tl.float32), 0))


def masked_sum(out, x, has_other):
    _sum_kernel[(1,)](out, x, len(x), has_other, 64)


def uninitialised(out):
    out += out.new_empty(len(out))


@triton.jit
def _bf16_kernel(wide_ptr, narrow_ptr, product_ptr, a_ptr, b_ptr, x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    square = i[:, None] * BLOCK + i[None, :]
    a, b = tl.load(a_ptr + square), tl.load(b_ptr + square)
    tl.store(wide_ptr + square, a.to(tl.float32))
    tl.store(narrow_ptr + square, tl.load(x_ptr + square).to(tl.bfloat16))
    tl.store(product_ptr + square, tl.dot(a, tl.abs(b), input_precision="ieee"))


def bf16(wide, narrow, product, a, b, x):
    _bf16_kernel[(1,)](wide, narrow, product, a, b, x, len(a))
