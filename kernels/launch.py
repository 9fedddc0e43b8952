"""What the launches of several kernels share: how work is cut, alignment, and precision."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = [
    "MULTIPLE", "aligned_rows", "block_bounds", "divide_samples", "fp32_precision", "misaligned",
    "num_sms",
]  # fmt: skip

# Triton asks of addresses (in bytes) and of sizes (in elements) whether 16 divides them. Where it
# does, loads are vectors, copied asynchronously, and addresses do not crowd the registers.
MULTIPLE = 16


def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def divide_samples(
    device: torch.device, num_samples: int, num_tiles: int, tiles_per_sm: int
) -> tuple[int, int]:
    """Return into how many groups the samples are cut, and how many samples a group has.

    Where one group's tiles are too few to fill the card, several programs share a tile, each with
    samples of its own: sums over samples add up. The cut depends on shapes and the card alone,
    never on the order in which programs run, so the bits of the result do not either.

    Args:
        device: where the kernel runs.
        num_samples: at least 1.
        num_tiles: programs that one group needs.
        tiles_per_sm: programs that a streaming multiprocessor holds at once.

    Returns:
        ``(num_splits, samples_per_split)``; no group is empty.
    """
    wanted = min(num_samples, max(1, num_sms(device) * tiles_per_sm // num_tiles))
    samples_per_split = -(-num_samples // wanted)
    return -(-num_samples // samples_per_split), samples_per_split


def fp32_precision() -> str:
    """Return the ``input_precision`` of products of fp32 operands, as the user set it for torch."""
    # Torch 2.9's own setting follows the older ones; asked in the old way, torch raises where the
    # user has set it in the new way.
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def misaligned(matrix: Tensor) -> bool:
    """Return whether vector accesses would not fit the rows of a matrix."""
    sizes = (matrix.data_ptr(), matrix.stride(0), matrix.shape[1])
    return matrix.stride(1) != 1 or any(size % MULTIPLE for size in sizes)


def aligned_rows(rows: Tensor) -> Tensor:
    """Return contiguous rows that vector loads fit: a copy, widened by zeros, if these do not.

    Without it a head of 30522 or 50257 classes would be loaded element by element, and the tensor
    cores would wait.
    """
    if rows.is_contiguous() and not misaligned(rows):
        return rows
    width = -(-rows.shape[1] // MULTIPLE) * MULTIPLE
    copy = rows.new_zeros(len(rows), width)
    copy[:, : rows.shape[1]] = rows
    return copy


@functools.lru_cache(maxsize=64)
def block_bounds(num_samples: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first row of samples of one length and one past the last, not to be written to."""
    bounds = torch.arange(num_samples + 1, device=device) * length
    return bounds[:-1], bounds[1:]
