"""The gradient of a layer's masked weights, without the dense gradient.

    out[e] = dW[index_e],   dW[r, c] = sum_t grad[t, r] x[t, c]   for a linear layer

The weight is taken as ``[rows, columns, kernel]``. In general the product is computed in chunks of
rows into a scratch that stays in the cache, and the masked entries are picked out of each; rows
without any are skipped. A `Plan` says which rows form a chunk and where its entries lie: integers
that are known when the weight is masked, so that the backward waits for no device. On the CPU,
where few entries are masked, csrc/masked_grad_cpu.cpp computes those k sums and nothing else.
An embedding's gradient is a sum over the tokens of each row: only rows of the batch are summed.

Every sum has a fixed order: results are the same bits in every run and, on the CPU, for any number
of threads, as far as torch's own products and convolutions are (cuDNN's are on request).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fishfast import _backend

__all__ = ["Plan", "input_grad", "is_traced", "masked_grad"]

# Bytes of a chunk's product, in fp32. On a GPU it stays in the L2 cache (40 MB on an A100, 50 MB on
# an H100) beside the operands that stream through, and 1024 rows of 4096 columns are tiles enough
# for every multiprocessor. A CPU's share of the last-level cache is smaller.
_SCRATCH_BYTES = {"cuda": 2**24, "cpu": 2**22}
# Rows or columns are copied together when at most this part of them has masked entries: beyond it
# the copies cost a GPU what the smaller product saves.
_FEW = 0.75
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/storage.h
# Multiplications that keep one thread busy for longer than a start of all takes.
_SERIAL = 2**21
# On the CPU, the part of the weight from which the product in chunks is faster than k sums.
_DENSE = 0.1


@dataclass(frozen=True)
class Plan:
    """How the gradient of one masked weight is computed.

    Attributes:
        rows: int64, the rows with masked entries; None: all.
        columns: int64, the columns with masked entries; None: all.
        positions: int32 [k], where each entry lies within its chunk's product; None: its index.
        chunks: of every chunk its first row, the end of its rows, its first entry and the end of
            its entries; rows count within ``rows``. Empty where the compiled kernel needs none.
        groups: of a convolution.
        device: where the tensors are.
    """

    rows: Tensor | None
    columns: Tensor | None
    positions: Tensor | None
    chunks: tuple[int, ...]
    groups: int
    device: torch.device

    @staticmethod
    def of(shape: Sequence[int], indices: Tensor, groups: int = 1) -> Plan:
        """Plan for a weight.

        Args:
            shape: of the weight.
            indices: int [k], ascending flat indices of its masked entries.
            groups: of a convolution.

        Returns:
            The plan, for the device of ``indices``.
        """
        if _sums_apart(shape, indices):
            return Plan(None, None, None, (), groups, indices.device)
        return _plan_chunks(shape, indices, groups)


def _sums_apart(shape: Sequence[int], indices: Tensor) -> bool:
    """Return whether the compiled kernel takes this weight, if it is a matrix's."""
    few = len(indices) <= _DENSE * math.prod(shape)
    return (
        few and len(shape) == 2 and indices.device.type == "cpu"
        and _backend.choose("masked_grad", indices.device) == "cpu"
    )  # fmt: skip


def _plan_chunks(shape: Sequence[int], indices: Tensor, groups: int) -> Plan:
    num_rows, num_columns, kernel = _matrix(shape)
    flat = indices.long()
    row, inner = flat // (num_columns * kernel), flat % (num_columns * kernel)
    rows = columns = None
    if groups == 1:
        row, rows = _compacted(row, num_rows)
        column, columns = _compacted(inner // kernel, num_columns)
        inner = column * kernel + inner % kernel
    num_rows = num_rows if rows is None else len(rows)
    num_columns = num_columns if columns is None else len(columns)
    width = num_columns * kernel

    bounds = _bounds(num_rows, num_rows // groups, _most_rows(width, indices.device.type))
    starts = [start for start, _ in bounds]
    bounds_on_device = torch.tensor([*starts, num_rows], device=row.device)
    first_entries = torch.searchsorted(row, bounds_on_device)
    first_rows = bounds_on_device[:-1].repeat_interleave(first_entries.diff(), output_size=len(row))
    entries = first_entries.tolist()
    positions = None
    if len(starts) > 1 or rows is not None or columns is not None:
        positions = ((row - first_rows) * width + inner).to(torch.int32)
    chunks = [
        (start, end, first, last)
        for (start, end), first, last in zip(bounds, entries, entries[1:], strict=False)
        if first < last
    ]
    numbers = tuple(number for chunk in chunks for number in chunk)
    return Plan(rows, columns, positions, numbers, groups, indices.device)


def _matrix(shape: Sequence[int]) -> tuple[int, int, int]:
    return shape[0], shape[1], math.prod(shape[2:])


def _compacted(index: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Return the indices among those that occur, and these; or as they are, and None."""
    occurs = torch.zeros(size, dtype=torch.bool, device=index.device)
    occurs[index] = True
    found = occurs.nonzero().flatten()
    if len(found) > _FEW * size:
        return index, None
    return (occurs.cumsum(0) - 1)[index], found


def _most_rows(width: int, device: str) -> int:
    scratch = _SCRATCH_BYTES.get(device, _SCRATCH_BYTES["cuda"])
    return max(1, scratch // (4 * max(1, width)))


def _bounds(num_rows: int, per_group: int, most: int) -> list[tuple[int, int]]:
    """Cut rows into chunks of at most ``most``: whole groups, or even parts of one."""
    if per_group <= most:
        step = most // max(1, per_group) * per_group
        return [(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
    step = -(-per_group // -(-per_group // most))
    return [
        (first, min(first + step, group + per_group))
        for group in range(0, num_rows, per_group)
        for first in range(group, group + per_group, step)
    ]


# --- the operation ---


def masked_grad(
    kind: str,
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    positions: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    chunks: Sequence[int],
    shape: Sequence[int],
    geometry: Sequence[int],
) -> Tensor:
    """Return ``dW[indices]`` in fp32, of one call of a layer.

    Args:
        kind: ``"linear"``, ``"transposed linear"`` (weight ``[in, out]``), ``"conv"`` or
            ``"embedding"``.
        grad: gradient of the layer's output.
        x: its input: ``[..., in]``, ``[N, C, ...]`` or ``[C, ...]``, or tokens; in the dtype of
            ``grad``.
        indices: int [k], ascending flat indices of the masked entries.
        positions: of the `Plan`, as are ``rows``, ``columns`` and ``chunks``.
        rows: see `Plan`.
        columns: see `Plan`.
        chunks: see `Plan`.
        shape: of the weight.
        geometry: of a convolution, stride, padding and dilation, each for every dim, and groups;
            of an embedding, the padding index or -1.
    """
    compute = _operation if is_traced() or type(grad) is not Tensor else _compute
    return compute(kind, grad, x, indices, positions, rows, columns, chunks, shape, geometry)


def is_traced() -> bool:
    """Return whether torch.compile or a transform of torch.func looks on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _compute(
    kind: str,
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    positions: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    chunks: Sequence[int],
    shape: Sequence[int],
    geometry: Sequence[int],
) -> Tensor:
    out = torch.empty(indices.shape, dtype=torch.float32, device=grad.device)
    if grad.numel() == 0 or x.numel() == 0:
        return out.zero_()
    if kind == "embedding":
        _embedding(grad, x, indices, shape, geometry[0], out)
        return out
    if not chunks:
        if _sums(kind, grad, x, indices, shape, out):
            return out
        groups = geometry[-1] if kind == "conv" else 1
        plan = _plan_chunks(shape, indices, groups)  # where nothing has to wait for it
        positions, rows, columns, chunks = plan.positions, plan.rows, plan.columns, plan.chunks
    where = indices if positions is None else positions
    if kind == "conv":
        products = _conv_products(grad, x, rows, columns, chunks, shape, geometry)
    else:
        products = _linear_products(kind, grad, x, rows, columns, chunks, shape)
    for (_, _, first, last), product in zip(_quadruples(chunks), products, strict=True):
        out[first:last] = product.flatten().index_select(0, where[first:last])
    return out


# What torch.compile and torch.func see; in eager mode its dispatch would take longer than a small
# layer's gradient.
_operation = torch.library.custom_op(
    "fishfast::masked_grad",
    _compute,
    mutates_args=(),
    schema="(str kind, Tensor grad, Tensor x, Tensor indices, Tensor? positions, Tensor? rows, "
    "Tensor? columns, int[] chunks, int[] shape, int[] geometry) -> Tensor",
)


@_operation.register_fake
def _(kind: str, grad: Tensor, x: Tensor, indices: Tensor, *plan: Any) -> Tensor:
    return grad.new_empty(indices.shape, dtype=torch.float32)


@_operation.register_vmap
def _(
    info: Any, in_dims: Any, kind: str, grad: Tensor, x: Tensor, indices: Tensor, *plan: Any
) -> tuple[Tensor, int]:
    """Compute one sample after the other."""
    samples = [
        [
            t if dim is None else t.select(dim, b)
            for t, dim in zip((grad, x), in_dims[1:3], strict=True)
        ]
        for b in range(info.batch_size)
    ]
    return torch.stack([_operation(kind, g, a, indices, *plan) for g, a in samples]), 0


def _quadruples(chunks: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    return zip(*[iter(chunks)] * 4, strict=True)


def _rows_of(tensor: Tensor) -> Tensor:
    """Return ``[..., n]`` as a matrix."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


# --- linear layers ---


def _linear_products(
    kind: str,
    grad: Tensor,
    x: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    chunks: Sequence[int],
    shape: Sequence[int],
) -> Iterator[Tensor]:
    """Yield the product of every chunk, each in the same memory."""
    left, right = _rows_of(grad), _rows_of(x)
    if kind == "transposed linear":
        left, right = right, left
    if columns is not None:
        right = right.index_select(1, columns)
    in_fp32 = left.dtype == torch.float32 or _mm_to_fp32(left)
    width = right.shape[1]
    most = max(end - start for start, end, _, _ in _quadruples(chunks))
    dtype = torch.float32 if in_fp32 else left.dtype
    scratch = torch.empty((most, width), dtype=dtype, device=left.device)
    for start, end, _, _ in _quadruples(chunks):
        part = left[:, start:end] if rows is None else left.index_select(1, rows[start:end])
        product = scratch[: end - start]
        if left.dtype == dtype:
            torch.mm(part.t(), right, out=product)
        else:
            torch.mm(part.t(), right, out_dtype=torch.float32, out=product)
        yield product


def _mm_to_fp32(operand: Tensor) -> bool:
    """Return whether a product of 16-bit operands can be had as it is summed, in fp32."""
    if operand.device.type != "cuda" or operand.element_size() != 2 or torch.version.hip:
        return False
    return "dtype_out" in torch.ops.aten.mm.overloads()  # torch 2.8


def _sums(
    kind: str, grad: Tensor, x: Tensor, indices: Tensor, shape: Sequence[int], out: Tensor
) -> bool:
    """Fill ``out`` by the compiled kernel; return whether it could."""
    storage = _STORAGE.get(grad.dtype)
    if storage is None or grad.device.type != "cpu" or x.dtype != grad.dtype:
        return False
    if len(shape) != 2 or _backend.choose("masked_grad", grad.device) != "cpu":
        return False
    left, right = (t if t.stride(1) == 1 else t.contiguous() for t in (_rows_of(grad), _rows_of(x)))
    if kind == "transposed linear":
        left, right = right, left
    _backend.compiled().masked_grad_cpu(
        *(t.data_ptr() for t in (out, left, right, indices)),
        sizes=(len(indices), len(left), *shape),
        strides=(left.stride(0), right.stride(0)),
        storage=storage,
        wide_indices=indices.dtype == torch.int64,
        num_threads=1 if len(indices) * len(left) < _SERIAL else _backend.num_threads(),
    )
    return True


# --- convolutions ---


def _conv_products(
    grad: Tensor,
    x: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    chunks: Sequence[int],
    shape: Sequence[int],
    geometry: Sequence[int],
) -> Iterator[Tensor]:
    """Yield the gradient of every chunk's output channels."""
    dims = len(shape) - 2
    if x.dim() == dims + 1:  # one sample
        grad, x = grad[None], x[None]
    stride, padding, dilation = (geometry[dims * i : dims * (i + 1)] for i in range(3))
    groups = geometry[-1]
    per_group = shape[0] // groups
    if columns is not None:
        x = x.index_select(1, columns)
    for start, end, _, _ in _quadruples(chunks):
        part = grad[:, start:end] if rows is None else grad.index_select(1, rows[start:end])
        first_group, last_group = start // per_group, (end - 1) // per_group
        seen, channels = x, x.shape[1] // groups
        if groups > 1:
            seen = x[:, first_group * channels : (last_group + 1) * channels]
        weight = x.new_empty(1).expand(end - start, channels, *shape[2:])  # only its shape matters
        _, product, _ = torch.ops.aten.convolution_backward(
            part, seen, weight, None, stride, padding, dilation, False, [0] * dims,
            last_group - first_group + 1, (False, True, False),
        )  # fmt: skip
        yield product


# --- embeddings ---


def _embedding(
    grad: Tensor, tokens: Tensor, indices: Tensor, shape: Sequence[int], padding: int, out: Tensor
) -> None:
    """Sum the tokens of each row in the order of their positions, at the row's first place."""
    grads = _rows_of(grad)
    tokens, order = tokens.flatten().sort(stable=True)
    first = torch.searchsorted(tokens, tokens)
    num_tokens = torch.searchsorted(tokens, tokens, right=True) - first
    at_first = first == torch.arange(len(tokens), device=tokens.device)
    # Lengths of 0 stand between the rows: shapes do not depend on how many there are.
    sums = torch.segment_reduce(
        grads.index_select(0, order).float(), "sum",
        lengths=torch.where(at_first, num_tokens, 0), unsafe=True, initial=0,
    )  # fmt: skip
    if len(indices) <= sums.numel():
        row, column = indices // shape[1], indices % shape[1]
        row = row.to(tokens.dtype)
        place = torch.searchsorted(tokens, row).clamp_(max=len(tokens) - 1)
        found = sums.flatten().index_select(0, place * shape[1] + column)
        out.copy_(found.masked_fill_((tokens[place] != row) | (row == padding), 0))
        return
    # Fewer sums than entries: look up the sums' places among the entries.
    at_first &= tokens != padding
    wanted = (tokens[:, None] * shape[1] + torch.arange(shape[1], device=tokens.device)).flatten()
    wanted = wanted.to(indices.dtype)
    entry = torch.searchsorted(indices, wanted).clamp_(max=len(indices) - 1)
    masked = (indices[entry] == wanted) & at_first.repeat_interleave(
        shape[1], output_size=len(wanted)
    )
    padded = out.new_zeros(len(out) + 1)  # what is not masked falls off behind the end
    padded[torch.where(masked, entry, len(out))] = sums.flatten()
    out.copy_(padded[:-1])


def input_grad(
    kind: str, grad: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int]
) -> Tensor:
    """Return the gradient of a layer's input, differentiable in the weight.

    Args:
        kind: as for `masked_grad`, but no embedding.
        grad: gradient of the layer's output.
        x: its input.
        weight: its weight.
        geometry: as for `masked_grad`.
    """
    weight = weight.to(grad.dtype)
    if kind == "linear":
        return grad @ weight
    if kind == "transposed linear":
        return grad @ weight.T
    dims = weight.dim() - 2
    stride, padding, dilation = (geometry[dims * i : dims * (i + 1)] for i in range(3))
    one = x.dim() == dims + 1
    grad, x = (grad[None], x[None]) if one else (grad, x)
    found, _, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0] * dims, geometry[-1],
        (True, False, False),
    )  # fmt: skip
    return found[0] if one else found
