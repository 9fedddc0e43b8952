"""Layers under a mask, and their weight gradients by torch's dense autograd, also in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from stepping import mask_of
from torch import Tensor, nn
from train_only_modules import numbers
from transformers.pytorch_utils import Conv1D

import fishfast as ff

Case = tuple[Callable[[], nn.Module], Tensor]

ROWS = numbers(5, 7, 37)
IMAGES = numbers(3, 6, 9, 8)
TOKENS = torch.randint(0, 23, (4, 9), generator=torch.Generator().manual_seed(5))


def transposed_weight() -> nn.Module:
    layer = nn.Linear(37, 29)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return layer


def channels_last() -> nn.Module:
    return nn.Conv2d(6, 10, 3).to(memory_format=torch.channels_last)


def padded_from_the_end() -> nn.Module:
    layer = nn.Embedding(23, 11)
    layer.padding_idx = int(TOKENS[0, 0]) - 23  # set by hand, as the constructor counts it up
    return layer


LINEAR: dict[str, Case] = {
    "linear": (lambda: nn.Linear(37, 29), ROWS),
    "linear, no bias": (lambda: nn.Linear(37, 29, bias=False), ROWS),
    "linear, 1-d": (lambda: nn.Linear(37, 29), ROWS[0, 0]),
    "linear, 2-d": (lambda: nn.Linear(37, 29), ROWS[0]),
    "linear, 4-d": (lambda: nn.Linear(37, 29), numbers(2, 3, 4, 37)),
    "linear, empty batch": (lambda: nn.Linear(37, 29), ROWS[:0]),
    "linear, many samples": (lambda: nn.Linear(37, 29), numbers(601, 37)),
    "linear, one wide row": (lambda: nn.Linear(1031, 1), numbers(33, 1031)),
    "linear, x not contiguous": (lambda: nn.Linear(37, 29), numbers(37, 12).t()),
    "linear, x with stride": (lambda: nn.Linear(37, 29), numbers(8, 5, 74)[:, 2, ::2]),
    "linear, transposed weight": (transposed_weight, ROWS),
    "gpt2": (lambda: Conv1D(29, 37), ROWS),
    "gpt2, 2-d": (lambda: Conv1D(29, 37), ROWS[0]),
}
CONV: dict[str, Case] = {
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1), numbers(4, 6, 17)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3), IMAGES),
    "conv2d, no bias, dilation": (lambda: nn.Conv2d(6, 10, 3, dilation=2, bias=False), IMAGES),
    "conv2d, 1x1": (lambda: nn.Conv2d(6, 10, 1), IMAGES),
    "conv2d, one number for all dims": (
        lambda: nn.Conv2d(6, 10, (3, 2), stride=(2,), padding=(2,), dilation=(2,)),
        IMAGES,
    ),
    "conv2d, stride": (lambda: nn.Conv2d(6, 10, (3, 2), (2, 3), (1, 0)), IMAGES),
    "conv2d, groups": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=3), IMAGES),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), IMAGES),
    "conv2d, same": (lambda: nn.Conv2d(6, 10, 3, padding="same"), IMAGES),
    "conv2d, uneven same": (lambda: nn.Conv2d(6, 10, 4, padding="same"), IMAGES),
    "conv2d, valid": (lambda: nn.Conv2d(6, 10, 3, padding="valid"), IMAGES),
    **{
        f"conv2d, {mode}": (
            lambda mode=mode: nn.Conv2d(6, 10, 3, stride=2, padding=(1, 2), padding_mode=mode),
            IMAGES,
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "conv2d, same, circular": (
        lambda: nn.Conv2d(6, 10, 4, padding="same", padding_mode="circular"),
        IMAGES,
    ),
    "conv2d, one image": (lambda: nn.Conv2d(6, 10, 3), IMAGES[0]),
    "conv2d, empty batch": (lambda: nn.Conv2d(6, 10, 3), IMAGES[:0]),
    "conv2d, channels_last": (channels_last, IMAGES.to(memory_format=torch.channels_last)),
    "conv2d, x not contiguous": (lambda: nn.Conv2d(6, 10, 3), numbers(6, 3, 9, 8).transpose(0, 1)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (2, 3, 3), padding=1, groups=2), numbers(2, 4, 4, 5, 6)),
}  # fmt: skip
EMBEDDING: dict[str, Case] = {
    "embedding": (lambda: nn.Embedding(23, 11), TOKENS),
    "embedding, wide": (lambda: nn.Embedding(23, 300), TOKENS),
    "embedding, every second": (lambda: nn.Embedding(23, 11), TOKENS.flatten()[::2]),
    "embedding, int32": (lambda: nn.Embedding(23, 11), TOKENS.int()),
    "embedding, one token": (lambda: nn.Embedding(23, 11), TOKENS[0, 0]),
    "embedding, one row": (lambda: nn.Embedding(23, 11), torch.full((3, 50), 4)),
    "embedding, no tokens": (lambda: nn.Embedding(23, 11), TOKENS[:0]),
    "embedding, large": (lambda: nn.Embedding(2003, 11), TOKENS * 87),
    "embedding, padding": (lambda: nn.Embedding(23, 11, padding_idx=int(TOKENS[0, 0])), TOKENS),
    "embedding, padding, large": (
        lambda: nn.Embedding(2003, 11, padding_idx=87 * int(TOKENS[0, 0])),
        TOKENS * 87,
    ),
    "embedding, padding from the end": (padded_from_the_end, TOKENS),
    "embedding, max_norm": (lambda: nn.Embedding(23, 11, max_norm=1.5, norm_type=1.0), TOKENS),
    "embedding, sparse": (lambda: nn.Embedding(23, 11, sparse=True), TOKENS),
}
CASES = {**LINEAR, **CONV, **EMBEDDING}


def masked_entries(shape: torch.Size, style: str) -> Tensor:
    """Return ascending flat indices: a few of all, of a few rows or columns, one, or all."""
    generator = torch.Generator().manual_seed(3)
    flat = torch.arange(shape.numel()).view(shape)
    if style == "few rows":
        flat = flat[torch.randperm(shape[0], generator=generator)[: max(1, shape[0] // 3)]]
    if style == "few columns":
        flat = flat[:, torch.randperm(shape[1], generator=generator)[: max(1, shape[1] // 3)]]
    flat = flat.flatten()
    part = {"few": 0.06, "one": 0, "all": 1, "last row": 0}.get(style, 0.3)
    some = torch.randperm(len(flat), generator=generator)[: max(1, int(part * len(flat)))]
    if style == "last row":
        some = torch.tensor([len(flat) - 1])
    return flat[some].sort().values.int()


def tuned_layer(layer: nn.Module, style: str) -> ff.SparseTuning:
    """Train some entries of the weight, without its dense gradient."""
    mask = mask_of(layer, {"weight": masked_entries(layer.weight.shape, style)})
    return ff.train_only(layer, mask, dense_gradient_limit=0)


def cotangent(out: Tensor) -> Tensor:
    """Return a gradient of the output, not contiguous where it can be."""
    return numbers(*out.shape[::-1], seed=8).permute(*range(out.dim())[::-1]).to(out)


def dense_gradient(layer: nn.Module, x: Tensor, dtype: torch.dtype, seen: torch.dtype) -> Tensor:
    """Return dW by torch, computed in a dtype from numbers as another dtype holds them."""
    layer = copy.deepcopy(layer).to(seen).to(dtype)
    x = x.to(seen).to(dtype) if x.is_floating_point() else x
    out = layer(x)
    out.backward(cotangent(out.to(seen)).to(dtype))
    grad = layer.weight.grad
    return (grad.to_dense() if grad.is_sparse else grad).detach()


def assert_gradient(found: Tensor, entries: Tensor, by_torch: Tensor, exact: Tensor) -> None:
    """Compare k gradients with float64: root mean square error at most twice torch's.

    Torch's is over the entries or over the whole dW, which is more: of few entries, torch may have
    all right by luck. And one rounding in fp32 is allowed. A mean over few entries spreads around
    that of many, so of fewer than 8 it may be twice as large: two standard deviations of one.
    """
    assert found.dtype == torch.float32
    assert found.shape == entries.shape
    by_torch, exact, entries = by_torch.flatten(), exact.flatten(), entries.long()
    error = _root_mean_square(found - exact[entries])
    errors_of_torch = by_torch - exact
    allowed = 2 * _root_mean_square(errors_of_torch)
    allowed = torch.maximum(allowed, 2 * _root_mean_square(errors_of_torch[entries]))
    allowed = torch.maximum(allowed, _root_mean_square(exact) * 2.0**-24)
    allowed = allowed * (2 if len(entries) < 8 else 1)
    assert error <= allowed, (error, allowed)


def _root_mean_square(numbers: Tensor) -> Tensor:
    return numbers.double().square().mean().sqrt()
