"""The arithmetic in torch behind `masked_grad`: products in chunks, sums of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fishfast.training.gradient.chunks import quadruples

__all__ = [
    "as_matrix",
    "conv_products",
    "input_grad",
    "linear_products",
    "sum_tokens",
    "weight_grad",
]


def as_matrix(tensor: Tensor) -> Tensor:
    """Return ``[..., n]`` as a matrix."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def linear_products(
    kind: str,
    grad: Tensor,
    x: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    chunks: Sequence[int],
    shape: Sequence[int],
) -> Iterator[Tensor]:
    """Yield the product of every chunk, each in the same memory."""
    left, right = as_matrix(grad), as_matrix(x)
    if kind == "transposed linear":
        left, right = right, left
    if columns is not None:
        right = right.index_select(1, columns)
    in_fp32 = left.dtype == torch.float32 or _mm_to_fp32(left)
    width = right.shape[1]
    most = max(end - start for start, end, _, _ in quadruples(chunks))
    dtype = torch.float32 if in_fp32 else left.dtype
    scratch = torch.empty((most, width), dtype=dtype, device=left.device)
    for start, end, _, _ in quadruples(chunks):
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


def conv_products(
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
    for start, end, _, _ in quadruples(chunks):
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


def sum_tokens(
    grad: Tensor, tokens: Tensor, indices: Tensor, shape: Sequence[int], padding: int, out: Tensor
) -> None:
    """Sum the tokens of each row in the order of their positions, at the row's first place.

    The shapes are the same for all tokens and entries: a GPU is not waited for.
    """
    grads = as_matrix(grad)
    tokens, order = tokens.flatten().long().sort(stable=True)  # times a row's length below
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
        row = row.long()
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


def weight_grad(
    kind: str, grad: Tensor, x: Tensor, shape: Sequence[int], geometry: Sequence[int]
) -> Tensor:
    """Return the dense gradient of a layer's weight, differentiable in ``grad`` and ``x``.

    Args:
        kind: as for `masked_grad`.
        grad: gradient of the layer's output.
        x: its input, in the dtype of ``grad``, or tokens.
        shape: of the weight.
        geometry: as for `masked_grad`.
    """
    if kind == "embedding":
        tokens, grads = x.flatten().long(), as_matrix(grad)
        grads = grads.masked_fill((tokens == geometry[0])[:, None], 0)
        return grads.new_zeros(tuple(shape)).index_add(0, tokens, grads)
    if kind == "linear":
        return as_matrix(grad).T @ as_matrix(x)
    if kind == "transposed linear":
        return as_matrix(x).T @ as_matrix(grad)
    dims = len(shape) - 2
    stride, padding, dilation = (geometry[dims * i : dims * (i + 1)] for i in range(3))
    if x.dim() == dims + 1:  # one sample
        grad, x = grad[None], x[None]
    _, found, _ = torch.ops.aten.convolution_backward(
        grad, x, x.new_empty(1).expand(tuple(shape)), None, stride, padding, dilation, False,
        [0] * dims, geometry[-1], (False, True, False),
    )  # fmt: skip
    return found
