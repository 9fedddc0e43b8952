"""How the gradient of a masked weight is computed: by which arithmetic, and what that costs.

A `Plan` is made once, when the weight is masked: all of it is known then, so that a backward has
shapes that do not depend on what is on the device, waits for nothing, and can be captured in a CUDA
graph. `fishfast.training.gradient.costs` counts; here stands which rows of the gradient are
computed together, and where the masked entries lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fishfast import _backend
from fishfast.training.gradient.costs import FEW, NEVER, Costs, as_matrix_of, occurring

__all__ = ["Plan", "plan_chunks", "quadruples"]

# Bytes of a chunk's product, in fp32. On a GPU it stays in the L2 cache (40 MB on an A100, 50 MB on
# an H100) beside the operands that stream through, and 1024 rows of 4096 columns are tiles enough
# for every multiprocessor. A CPU's share of the last-level cache is smaller.
_SCRATCH_BYTES = {"cuda": 2**24, "cpu": 2**22}


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
        share: of the dense product's multiply-adds, what this way costs.
        least: numbers in a layer's input from which this way is faster than the dense gradient.
        least_traced: the same in a compiled graph, where there is no Python to pay for.
    """

    rows: Tensor | None
    columns: Tensor | None
    positions: Tensor | None
    chunks: tuple[int, ...]
    groups: int
    device: torch.device
    share: float = 1.0
    least: int = 0
    least_traced: int = 0

    @staticmethod
    def of_tokens(device: torch.device) -> Plan:
        """Return the plan of an embedding, whose entries are summed token by token.

        Args:
            device: where the entries are.
        """
        return Plan(None, None, None, (), 1, device)

    @staticmethod
    def of(
        shape: Sequence[int],
        indices: Tensor,
        *,
        groups: int = 1,
        inputs: int = 0,
        may_be_dense: bool = True,
    ) -> Plan:
        """Plan for a weight, by the way that costs least.

        Args:
            shape: of the weight.
            indices: int [k], ascending flat indices of its masked entries.
            groups: of a convolution.
            inputs: numbers in the layer's input for each row of the product; default: columns.
            may_be_dense: a dense gradient may live for a moment.

        Returns:
            The plan, for the device of ``indices``.
        """
        device = indices.device
        costs = Costs.of(shape, indices, groups)
        if costs.sums < costs.product and _sums_apart(shape, device):
            plan, cost = Plan(None, None, None, (), groups, device), costs.sums
        else:
            plan, cost = plan_chunks(shape, indices, groups), costs.product
        least = costs.least_rows(cost) if may_be_dense else 0
        return replace(
            plan,
            share=cost / costs.dense,
            least=min(NEVER, least * (inputs or shape[1])),
            least_traced=NEVER if may_be_dense and cost >= costs.dense else 0,
        )

    def in_words(self) -> str:
        """Return what is computed, and from how large an input on."""
        kind = "products of rows and columns" if self.chunks else "sums of masked entries alone"
        done = f"{kind}, {100 * self.share:.0f} % of the dense product"
        if self.least >= NEVER:
            return "picked from the dense gradient"
        if self.least:
            return f"{done}, of inputs from {self.least:,} numbers on"
        return done


def _sums_apart(shape: Sequence[int], device: torch.device) -> bool:
    """Return whether a compiled kernel can take this weight, if it is a matrix's."""
    return (
        len(shape) == 2 and device.type == "cpu" and _backend.choose("masked_grad", device) == "cpu"
    )  # fmt: skip


def plan_chunks(shape: Sequence[int], indices: Tensor, groups: int) -> Plan:
    """Plan for products in chunks; see `Plan.of`."""
    num_rows, num_columns, kernel = as_matrix_of(shape)
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


def _compacted(index: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Return the indices among those that occur, and these; or as they are, and None."""
    occurs = occurring(index, size)
    found = occurs.nonzero().flatten()
    if len(found) > FEW * size:
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
