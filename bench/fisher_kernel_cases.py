"""Operands for the primitives of the Fisher engine, what torch ops can do with them, and the floor.

A case has the floor (the ordinary weight gradient of the same shapes, whose FLOPs are the same),
the contenders, and the exact result in float64. What torch ops can do at best, eager and fused by
torch.compile: one bmm forms the per-sample gradients of as many samples, and as many rows of the
weight, as fit into the cache, and their squares are added; where every sample is one row, the
square factors and one GEMM of squares is all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fishfast.fisher.engine import accumulate

__all__ = [
    "CONTENDERS", "Add", "KernelCase", "conv", "embedding", "layer_norm", "linear",
]  # fmt: skip

Add = Callable[[Tensor], None]
CONTENDERS = ("fishfast", "torch ops", "torch ops, compiled")


@dataclasses.dataclass(eq=False)
class KernelCase:
    """One primitive on one set of operands.

    Args:
        title: the operands' sizes.
        shape: of the scores.
        grad: the gradient of the outputs, that floor, contenders and ``exact`` read.
        floor: returns the weight gradient, and computes nothing else.
        contenders: name -> a function that adds the squares to fp32 scores in place, or why there
            is none.
        exact: over samples in float64, the sum of squared gradients and that of gradients.
        flops: of the floor; 0 where bytes count.
        num_bytes: what must be moved at the least: operands read, scores read and written.
        sizes: batch, and length of a sequence.
    """

    title: str
    shape: tuple[int, ...]
    grad: Tensor
    floor: Callable[[], Tensor]
    contenders: dict[str, Add | str]
    exact: Callable[[], tuple[Tensor, Tensor]]
    flops: int
    num_bytes: int
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def _add_bmm(score: Tensor, left: Tensor, right: Tensor) -> None:
    score += torch.matmul(left, right).float().square_().sum(0)


def _add_factored(score: Tensor, grad: Tensor, x: Tensor) -> None:
    score += torch.mm(grad.square().T, x.square())


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=False)


def _chunk_bytes(device: torch.device) -> int:
    """Return what a chunk of per-sample gradients may take to stay in the cache until squared."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size // 2
    return 2**22  # the fastest of 1/4 to 64 MiB on an EPYC core, whose L3 is shared


def _chunked_bmm(
    left: Callable[[slice], Tensor], right: Callable[[slice], Tensor], batch: int,
    sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device, copied: int = 0,
) -> dict[str, Add | str]:  # fmt: skip
    """Return the baselines that form per-sample gradients, a cache full at a time.

    Args:
        left: a slice of samples -> [b, groups, rows, T], the gradients.
        right: a slice of samples -> [b, groups, T, columns], the inputs.
        batch: number of samples.
        sizes: groups, rows and columns of the weight.
        dtype: of the operands.
        device: where they are.
        copied: values per sample that ``right`` copies.
    """
    groups, num_rows, columns = sizes
    fitting = _chunk_bytes(device) // dtype.itemsize  # values
    rows = max(1, min(num_rows, fitting // (groups * columns)))
    samples = max(1, min(batch, fitting // (groups * num_rows * columns + copied)))

    def add(step: Callable[..., None], score: Tensor) -> None:
        score = score.view(groups, num_rows, columns)
        for start in range(0, batch, samples):
            chunk = slice(start, min(batch, start + samples))
            grads, inputs = left(chunk), right(chunk)
            for row in range(0, num_rows, rows):
                part = slice(row, row + rows)
                step(score[:, part], grads[:, :, part], inputs)

    return {
        "torch ops": lambda score: add(_add_bmm, score),
        "torch ops, compiled": lambda score: add(_compiled(_add_bmm), score),
    }


def linear(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, outputs: int, inputs: int,
    padded: bool = False,
) -> KernelCase:  # fmt: skip
    """A linear layer; ``padded``: samples of 1/8 to all of the length, the rest is padding."""
    grad = torch.randn(batch, length, outputs, device=device).to(dtype)
    x = torch.randn(batch, length, inputs, device=device).to(dtype)
    starts = torch.arange(batch, device=device) * length
    lengths = torch.full_like(starts, length)
    if padded:
        lengths = torch.randint(max(1, length // 8), length + 1, (batch,), device=device)
        used = torch.arange(length, device=device) < lengths[:, None]
        grad, x = (t * used[..., None] for t in (grad, x))
    rows = {"grad": grad.flatten(0, 1), "x": x.flatten(0, 1)}
    per_row = length == 1
    starts, ends = (None, None) if per_row else (starts, starts + lengths)
    out = torch.empty(outputs, inputs, dtype=dtype, device=device)

    def add(score: Tensor) -> None:
        accumulate.add_linear(score, **rows, starts=starts, ends=ends, power=2)

    baselines: dict[str, Add | str]
    if per_row:
        baselines = {
            "torch ops": lambda score: _add_factored(score, **rows),
            "torch ops, compiled": lambda score: _compiled(_add_factored)(score, **rows),
        }
    else:
        baselines = _chunked_bmm(
            lambda b: grad[b].mT.unsqueeze(1), lambda b: x[b].unsqueeze(1), batch,
            (1, outputs, inputs), dtype, device,
        )  # fmt: skip

    def exact() -> tuple[Tensor, Tensor]:
        if per_row:  # a loop over thousands of outer products takes minutes
            g, a = rows["grad"].double(), rows["x"].double()
            return g.square().T @ a.square(), g.T @ a
        pairs = zip(grad.double(), x.double(), strict=True)
        return _summed((outputs, inputs), device, (g.T @ a for g, a in pairs))

    return KernelCase(
        title=f"linear {outputs}x{inputs} T={length} B={batch}{' padded' if padded else ''}",
        shape=(outputs, inputs),
        grad=rows["grad"],
        floor=lambda: torch.mm(rows["grad"].T, rows["x"], out=out),
        contenders={"fishfast": add, **baselines},
        exact=functools.cache(exact),
        flops=2 * batch * length * outputs * inputs,
        num_bytes=grad.nbytes + x.nbytes + 8 * outputs * inputs,
        sizes={"batch": batch, "length": length},
    )  # fmt: skip


def conv(
    device: torch.device, dtype: torch.dtype, batch: int, channels: tuple[int, int], side: int,
    kernel: int, stride: int = 1, groups: int = 1,
) -> KernelCase:  # fmt: skip
    """A 2-d convolution with "same" padding; one as far apart as it is wide has none: patches."""
    before, after = channels
    padding = kernel // 2 if stride < kernel else 0
    options: dict[str, Any] = {
        "stride": (stride, stride), "padding": (padding, padding), "dilation": (1, 1),
    }  # fmt: skip
    x = torch.randn(batch, before, side, side, device=device).to(dtype)
    weight = torch.randn(after, before // groups, kernel, kernel, device=device).to(dtype)
    grad = torch.randn_like(F.conv2d(x, weight, groups=groups, **options))
    columns, positions = weight[0].numel(), grad.shape[2] * grad.shape[3]

    def floor() -> Tensor:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, options["stride"], options["padding"], options["dilation"],
            False, [0, 0], groups, [False, True, False],
        )[1]  # fmt: skip

    def add(score: Tensor) -> None:
        accumulate.add_conv(score, grad, x, **options, groups=groups, power=2)

    def exact() -> tuple[Tensor, Tensor]:
        pairs = zip(grad.double().split(1), x.double().split(1), strict=True)
        gradients = (conv2d_weight(a, weight.shape, g, groups=groups, **options) for g, a in pairs)
        return _summed(weight.shape, device, gradients)

    def unfolded(chunk: slice) -> Tensor:
        return F.unfold(x[chunk], kernel, 1, padding, stride).unflatten(1, (groups, -1)).mT

    def per_group(chunk: slice) -> Tensor:
        return grad[chunk].flatten(2).unflatten(1, (groups, -1))

    return KernelCase(
        title=f"conv {before}->{after} {kernel}x{kernel}/{stride} {side}px B={batch}"
        + (f" groups={groups}" if groups > 1 else ""),
        shape=tuple(weight.shape),
        grad=grad,
        floor=floor,
        contenders={
            "fishfast": add,
            **_chunked_bmm(
                per_group, unfolded, batch, (groups, after // groups, columns), dtype, device,
                copied=groups * columns * positions,
            ),
        },
        exact=functools.cache(exact),
        flops=2 * batch * positions * weight.numel(),
        num_bytes=grad.nbytes + x.nbytes + 8 * weight.numel(),
    )  # fmt: skip


def embedding(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, tokens: int, width: int
) -> KernelCase:
    """An embedding; tokens are drawn by Zipf's law, so that some repeat within a sample."""
    often = 1 / torch.arange(1, tokens + 1)
    ids = torch.multinomial(often, batch * length, replacement=True).to(device)
    samples = torch.arange(batch, device=device).repeat_interleave(length)
    grad = torch.randn(batch * length, width, device=device).to(dtype)

    def by_index_add(score: Tensor) -> None:
        pairs, place = torch.unique(ids * batch + samples, return_inverse=True)
        sums = torch.zeros(len(pairs), width, device=device).index_add_(0, place, grad.float())
        score.index_add_(0, pairs // batch, sums.square_())

    def exact() -> tuple[Tensor, Tensor]:
        per_sample = zip(ids.split(length), grad.double().split(length), strict=True)
        zeros = torch.zeros(tokens, width, dtype=torch.float64, device=device)
        return _summed(zeros.shape, device, (zeros.index_add(0, *own) for own in per_sample))

    return KernelCase(
        title=f"embedding {tokens}x{width} T={length} B={batch}",
        shape=(tokens, width),
        grad=grad,
        floor=lambda: torch.ops.aten.embedding_dense_backward(grad, ids, tokens, -1, False),
        contenders={
            "fishfast": lambda score: accumulate.add_embedding(score, ids, samples, grad, power=2),
            "torch ops": by_index_add,
            "torch ops, compiled": "the number of distinct tokens depends on the data",
        },
        exact=functools.cache(exact),
        flops=0,
        num_bytes=grad.nbytes + ids.nbytes + 8 * len(ids.unique()) * width,
    )


def layer_norm(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, width: int
) -> KernelCase:
    """Weight and bias of a layer norm; rows of the scores are the two."""
    grad = torch.randn(batch, length, width, device=device).to(dtype)
    x = torch.randn(batch, length, width, device=device).to(dtype)
    weight, bias = torch.ones(2, width, dtype=dtype, device=device)
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, [width], weight, bias, 1e-5)

    def add(score: Tensor) -> None:
        accumulate.add_sum(score[0], grad, x, mean, rstd, power=2)
        accumulate.add_sum(score[1], grad, None, None, None, power=2)

    def floor() -> Tensor:
        _, *found = torch.ops.aten.native_layer_norm_backward(
            grad, x, [width], mean, rstd, weight, bias, [False, True, True]
        )
        return torch.stack(found)

    def exact() -> tuple[Tensor, Tensor]:
        per_sample = _per_sample(*(t.double() for t in (grad, x, mean, rstd)))
        return per_sample.square().sum(1), per_sample.sum(1)

    return KernelCase(
        title=f"layer norm {width} T={length} B={batch}",
        shape=(2, width),
        grad=grad,
        floor=floor,
        contenders={
            "fishfast": add,
            "torch ops": lambda score: _add_sums(score, grad, x, mean, rstd),
            "torch ops, compiled": lambda score: _compiled(_add_sums)(score, grad, x, mean, rstd),
        },
        exact=functools.cache(exact),
        flops=0,
        num_bytes=grad.nbytes + x.nbytes + 16 * width,
    )


def _per_sample(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.stack([(grad * ((x - mean) * rstd)).sum(1), grad.sum(1)])


def _add_sums(score: Tensor, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    score += _per_sample(grad.float(), x.float(), mean, rstd).square().sum(1)


def _summed(
    shape: Sequence[int], device: torch.device, gradients: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the sums of the samples' squared gradients, and of the gradients, in float64."""
    squares, total = torch.zeros(2, *shape, dtype=torch.float64, device=device)
    for gradient in gradients:
        squares += gradient.square()
        total += gradient
    return squares, total
