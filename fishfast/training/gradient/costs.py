"""What the gradient of a masked weight costs, counted: the figures behind every choice of a way.

All costs are per row of the product (a token, a position of a convolution), in multiply-adds of the
dense product, of which an entry of the weight takes one. The weights below are measured ratios.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FEW", "NEVER", "Costs", "as_matrix_of", "occurring"]

NEVER = sys.maxsize
# Rows or columns are copied together when at most this part of them has masked entries. At a half
# the product then takes 0.6 of its time on a CPU, at 0.9 the copies cost what it saves; by counted
# bytes and flops a GPU breaks even near 0.75.
FEW = 0.75
# A number that is copied by index_select, or into the transposed panels of the compiled kernel.
_COPY = 20.0
_TRANSPOSE = 40.0
# A multiply-add of the compiled kernel, whose every sum reads both of its runs.
_SUM = 3.5
# What a CPU core or a GPU multiplies and adds in the 50 us of the side tap's Python.
_SIDE_TAP = {"cpu": 2e6, "cuda": 1e10}


@dataclass(frozen=True)
class Costs:
    """The multiply-adds of each way to compute the gradient of one weight.

    Attributes:
        dense: of the dense gradient.
        product: of a product of the rows and columns that have masked entries.
        sums: of one sum for each masked entry.
        side_tap: of the Python that a side tap takes, for all rows together.
    """

    dense: float
    product: float
    sums: float
    side_tap: float

    @staticmethod
    def of(shape: Sequence[int], indices: Tensor, groups: int = 1) -> Costs:
        """Count for a weight.

        Args:
            shape: of the weight.
            indices: int [k], flat, of its masked entries.
            groups: of a convolution: only a product of all rows and columns is made.

        Returns:
            The costs.
        """
        num_rows, num_columns, kernel = as_matrix_of(shape)
        flat = indices.long()
        rows = int(occurring(flat // (num_columns * kernel), num_rows).sum())
        columns = int(occurring(flat // kernel % num_columns, num_columns).sum())
        sums = _SUM * len(indices) + _TRANSPOSE * (rows + columns)
        copied = 0
        if groups > 1 or rows > FEW * num_rows:
            rows = num_rows
        else:
            copied += rows
        if groups > 1 or columns > FEW * num_columns:
            columns = num_columns
        else:
            copied += columns
        dense = float(math.prod(shape))
        product = float(rows * columns * kernel) + _COPY * copied
        side_tap = _SIDE_TAP.get(indices.device.type, _SIDE_TAP["cuda"])
        return Costs(dense, product, sums, side_tap)

    def least_rows(self, cost: float) -> int:
        """Return from how many rows on a way of this cost is faster than the dense gradient.

        Args:
            cost: one of the attributes.

        Returns:
            At least 1; `NEVER` where it is no faster.
        """
        if cost >= self.dense:
            return NEVER
        return max(1, math.ceil(self.side_tap / (self.dense - cost)))


def as_matrix_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the rows, columns and kernel positions of a weight."""
    return shape[0], shape[1], math.prod(shape[2:])


def occurring(index: Tensor, size: int) -> Tensor:
    """Return bool [size]: which numbers occur in ``index``."""
    occurs = torch.zeros(size, dtype=torch.bool, device=index.device)
    occurs[index] = True
    return occurs
