"""The gradient of a layer's masked weights, without the dense gradient.

    out[e] = dW[index_e],   dW[r, c] = sum_t grad[t, r] x[t, c]   for a linear layer

The weight is taken as ``[rows, columns, kernel]``. In general the product is computed in chunks of
rows into a scratch that stays in the cache, and the masked entries are picked out of each; rows
without any are skipped. A `Plan` says which rows form a chunk and where its entries lie: integers
that are known when the weight is masked, so that the backward waits for no device. On the CPU,
where few entries are masked, csrc/masked_grad_cpu.cpp computes those k sums and nothing else.
An embedding's gradient is a sum over the tokens of each row: only rows of the batch are summed, and
by csrc/masked_grad_tokens_cpu.cpp only their masked entries.

Every sum has a fixed order: results are the same bits in every run and, on the CPU, for any number
of threads, as far as torch's own products and convolutions are (cuDNN's are on request).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fishfast import _backend
from fishfast.training.gradient.chunks import plan_chunks, quadruples
from fishfast.training.gradient.products import (
    as_matrix,
    conv_products,
    linear_products,
    sum_tokens,
)
from fishfast.training.gradient.weight_tap import is_traced

__all__ = ["masked_grad"]

_TIME = 0.05  # nanoseconds for a product
_TOKEN_TIME = 1.0  # nanoseconds for an entry of a token's row


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
    if 0 in (grad.numel(), x.numel(), out.numel()):
        return out.zero_()
    if kind == "embedding":
        if not _sums_of_tokens(grad, x, indices, shape, geometry[0], out):
            sum_tokens(grad, x, indices, shape, geometry[0], out)
        return out
    if not chunks:
        if _sums(kind, grad, x, indices, shape, out):
            return out
        groups = geometry[-1] if kind == "conv" else 1
        plan = plan_chunks(shape, indices, groups)  # where nothing has to wait for it
        positions, rows, columns, chunks = plan.positions, plan.rows, plan.columns, plan.chunks
    where = indices if positions is None else positions
    if kind == "conv":
        products = conv_products(grad, x, rows, columns, chunks, shape, geometry)
    else:
        products = linear_products(kind, grad, x, rows, columns, chunks, shape)
    for (_, _, first, last), product in zip(quadruples(chunks), products, strict=True):
        flat, found = product.flatten(), out[first:last]
        if flat.dtype == out.dtype:
            torch.index_select(flat, 0, where[first:last], out=found)
        else:
            found.copy_(flat.index_select(0, where[first:last]))
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


def _is_compiled_for(grad: Tensor) -> bool:
    if grad.device.type != "cpu" or grad.dtype not in _backend.STORAGE:
        return False
    return _backend.choose("masked_grad", grad.device) == "cpu"


def _rows_together(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _sums(
    kind: str, grad: Tensor, x: Tensor, indices: Tensor, shape: Sequence[int], out: Tensor
) -> bool:
    """Fill ``out`` by the compiled kernel; return whether it could."""
    if not _is_compiled_for(grad) or x.dtype != grad.dtype or len(shape) != 2:
        return False
    left, right = (_rows_together(as_matrix(t)) for t in (grad, x))
    if kind == "transposed linear":
        left, right = right, left
    _backend.compiled().masked_grad_cpu(
        *(t.data_ptr() for t in (out, left, right, indices)),
        sizes=(len(indices), len(left), *shape),
        strides=(left.stride(0), right.stride(0)),
        storage=_backend.STORAGE[grad.dtype],
        wide_indices=indices.dtype == torch.int64,
        num_threads=_backend.num_threads(len(indices) * len(left) * _TIME),
    )
    return True


def _sums_of_tokens(
    grad: Tensor, tokens: Tensor, indices: Tensor, shape: Sequence[int], padding: int, out: Tensor
) -> bool:
    """Do the same for an embedding; the bits are those of `sum_tokens`."""
    if not _is_compiled_for(grad):
        return False
    rows, tokens = _rows_together(as_matrix(grad)), tokens.reshape(-1).long().contiguous()
    entries = len(tokens) * len(indices) / shape[0]  # of all tokens' rows, if rows have as many
    _backend.compiled().masked_grad_tokens_cpu(
        *(t.data_ptr() for t in (out.zero_(), rows, tokens, indices)),
        sizes=(len(indices), len(tokens), *shape),
        stride=rows.stride(0),
        padding=padding,
        storage=_backend.STORAGE[grad.dtype],
        wide_indices=indices.dtype == torch.int64,
        num_threads=_backend.num_threads(entries * _TOKEN_TIME),
    )
    return True
