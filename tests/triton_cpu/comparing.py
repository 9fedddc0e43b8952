"""How close to float64 is close enough, and the operands that tests use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# The product, f, the sum over samples and the sum into the score: each rounds once to 24 bits,
# where plain torch may happen to hit the exact value.
_ROUNDINGS = 4 * 2.0**-24


def assert_close(score: Tensor, before: Tensor, plain, truth: np.ndarray) -> None:
    """Compare what was added to ``score`` with ``truth``, by the error of plain torch.

    Args:
        score: after the kernel.
        before: the same, before it.
        plain: adds the same to a score, in plain torch.
        truth: what had to be added, in float64.
    """
    wanted = before.double().numpy() + truth
    by_torch = before.clone()
    plain(by_torch)
    scale = np.abs(wanted).max()
    error = np.abs(score.double().numpy() - wanted).max()
    error_of_torch = np.abs(by_torch.double().numpy() - wanted).max()
    assert scale > 0, "nothing is compared"
    assert error <= 2 * error_of_torch + _ROUNDINGS * scale, (
        f"error {error:.3g}, plain torch {error_of_torch:.3g}, scale {scale:.3g}"
    )


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)
