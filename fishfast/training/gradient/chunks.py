"""Which rows of a masked weight's gradient are computed together, and where its entries lie.

Made once, when the weight is masked: all of it is known then, so that a backward has shapes that do
not depend on what is on the device, waits for nothing, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fishfast import _backend

__all__ = ["Plan", "plan_chunks", "quadruples"]

# Bytes of a chunk's product, in fp32. On a GPU it stays in the L2 cache (40 MB on an A100, 50 MB on
# an H100) beside the operands that stream through, and 1024 rows of 4096 columns are tiles enough
# for every multiprocessor. A CPU's share of the last-level cache is smaller.
_SCRATCH_BYTES = {"cuda": 2**24, "cpu": 2**22}
# Rows or columns are copied together when at most this part of them has masked entries. At a half
# the product then takes 0.6 of its time on a CPU, at 0.9 the copies cost what it saves; by counted
# bytes and flops a GPU breaks even near 0.75.
_FEW = 0.75
# On the CPU, the part of the weight up to which k sums are taken one by one: in fp32 they are 10
# times as fast as the product at 0.5 %, 1.4 to 2 times at 10 %, and slower at 20 %.
_DENSE = 0.1


@dataclass(frozen=True)
class Plan:
    """How the gradient of one masked weight is computed.

    Attributes:
        rows: int64, the rows with masked entries; None: all.
        columns: int64, the columns with masked entries; None: all.
        positions: int32 [k], where each entry lies within its chunk's product; None: its index.
        chunks: of every chunk its first row, the end of its rows, its first entry and the end of
            its entries; rows count within ``rows``. Empty where there is no product.
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
    def without_chunks(device: torch.device, groups: int = 1) -> Plan:
        """Return the plan of entries that are summed one by one.

        Args:
            device: where they are.
            groups: of a convolution.
        """
        return Plan(None, None, None, (), groups, device)

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
            return Plan.without_chunks(indices.device, groups)
        return plan_chunks(shape, indices, groups)


def _sums_apart(shape: Sequence[int], indices: Tensor) -> bool:
    """Return whether the compiled kernel takes this weight, if it is a matrix's."""
    few = len(indices) <= _DENSE * math.prod(shape)
    return (
        few and len(shape) == 2 and indices.device.type == "cpu"
        and _backend.choose("masked_grad", indices.device) == "cpu"
    )  # fmt: skip


def plan_chunks(shape: Sequence[int], indices: Tensor, groups: int) -> Plan:
    """Plan for products in chunks; see `Plan.of`."""
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


def quadruples(chunks: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Return the numbers of each chunk in turn.

    Args:
        chunks: of a `Plan`.

    Returns:
        ``(first row, end of rows, first entry, end of entries)`` of each.
    """
    return zip(*[iter(chunks)] * 4, strict=True)
