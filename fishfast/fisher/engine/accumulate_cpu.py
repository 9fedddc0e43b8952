"""The sums of accumulate.py on the CPU, by compiled kernels where torch's calls cost more.

csrc/fisher_linear_cpu.cpp runs where samples are short, csrc/fisher_sum_cpu.cpp where features are
adjacent in memory.

A product per sample costs a pass over the weight, which a sample of few rows does not pay for: at
16 rows torch's products take twice the time of the weight's ordinary gradient, at 4 rows six to
nine times. Samples of many rows are torch's. Convolutions are the kernel's for longer: torch's
products need their windows copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishfast import _backend
from fishfast.fisher.engine import accumulate
from fishfast.fisher.engine.accumulate import add_embedding
from fishfast.fisher.engine.accumulate_conv import padded, windows

__all__ = ["add_blocks", "add_conv", "add_embedding", "add_linear", "add_sum"]

# Mean rows of a sample up to which the compiled kernel runs. It has 0.85 to 0.9 of MKL's rate with
# AVX2 and catches up at 128 rows; a machine with wider vectors would do so earlier.
_SHORT = 64
# Output positions up to which it takes a convolution, whose windows torch's products need copied:
# up to half of their time. Its sums are plain ones, which lose digits in longer samples. Windows of
# fewer channels are read number by number, which pays for few positions only.
_SHORT_CONV, _FEW_CHANNELS = 4096, 8
# fp32 values (4 MB) of a convolution's inputs and gradients that are copied at once.
_HELD = 2**20
_TIME = 0.025  # nanoseconds for a product
_SUM_TIME = 1.0  # nanoseconds for an element of a gradient that is summed


def add_blocks(
    score: Tensor, bias: Tensor | None, grad: Tensor, x: Tensor, bias_of_x: bool, power: int
) -> None:
    """Add a linear layer's weight and bias, samples of one length; see accumulate.py."""
    swapped = score.stride(1) != 1
    if swapped:
        score, grad, x, bias_of_x = score.T, x, grad, not bias_of_x
    length = grad.shape[1]
    if not 1 < length <= _SHORT or score.stride(1) != 1 or not grad.numel() or not x.numel():
        accumulate.add_blocks_by(add_linear, add_sum, score, bias, grad, x, bias_of_x, power)
        return
    if bias is not None and bias.stride(0) != 1:
        add_sum(None, x if bias_of_x else grad, None, None, None, power, bias)
        bias = None
    if grad.dtype is not torch.float32:
        grad, x = grad.float(), x.float()
    (num_outputs, num_inputs), num_samples = score.shape, grad.shape[0]
    _backend.compiled().fisher_linear_blocks_cpu(
        (score.data_ptr(), 0 if bias is None else bias.data_ptr(), grad.data_ptr(), x.data_ptr()),
        (num_outputs, num_inputs, num_samples, length, score.stride(0)),
        (*grad.stride(), *x.stride()),
        bias_of_x,
        power,
        _backend.num_threads(num_outputs * num_inputs * num_samples * length * _TIME),
    )


def add_sum(
    score: Tensor | None,
    grad: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    power: int,
    bias: Tensor | None = None,
) -> None:
    """Add a norm's scale and shift, or a bias; see accumulate.py."""
    lead, width = grad.shape[:2], grad.shape[2]
    addresses = [0 if score is None else score.data_ptr(), 0 if bias is None else bias.data_ptr()]
    strides: list[int] = []
    held = []  # until the kernel has run
    by_row = grad.numel() > 0 and all(t is None or t.stride(0) == 1 for t in (score, bias))
    for tensor, column in ((grad, 1), (x, 1), (mean, 0), (rstd, 0)):
        if tensor is None:
            addresses.append(0)
            strides += (0, 0)
            continue
        tensor = tensor if tensor.dtype is torch.float32 else tensor.float()
        if tensor.shape[:2] != lead:
            tensor = tensor.expand(*lead, tensor.shape[2])
        held.append(tensor)
        addresses.append(tensor.data_ptr())
        *outer, inner = tensor.stride()
        strides += outer
        by_row &= inner == column or tensor.shape[2] == 1
        by_row &= column == 0 or tensor.shape[2] == width
    if not by_row:
        accumulate.add_sum(score, grad, x, mean, rstd, power, bias)
        return
    _backend.compiled().fisher_sum_cpu(
        addresses,
        grad.shape,
        strides,
        power,
        _backend.num_threads(grad.numel() * _SUM_TIME),
    )


def add_linear(
    score: Tensor,
    grad: Tensor,
    x: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    power: int,
) -> None:
    """Add ``sum_b f( sum_{r in b} grad[r, o] x[r, i] )`` to ``score[o, i]``; see accumulate.py."""
    if starts is None or ends is None or len(grad) > _SHORT * len(starts):
        accumulate.add_linear(score, grad, x, starts, ends, power)
        return
    if score.stride(1) != 1 and score.stride(0) == 1:
        score, grad, x = score.T, x, grad
    if score.stride(1) != 1 or not all(t.numel() for t in (score, grad, x, starts)):
        accumulate.add_linear(score, grad, x, starts, ends, power)
        return
    grad, x = grad.float(), x.float()
    _add(score, (grad, *_steps(grad)), (x, *_steps(x)), starts, ends, power)


def add_conv(
    score: Tensor,
    grad: Tensor,
    x: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    power: int,
) -> None:
    """Add ``sum_b f( gradient of sample b's conv2d weight )`` to ``score``; see accumulate.py.

    It is a linear layer over the windows of the input, which are read where they are.
    """
    num_out, channels, kh, kw = score.shape
    positions = grad.shape[2:].numel()
    # A 1x1 convolution has no windows: torch's products need no copies either.
    few = _SHORT // 4 if kh * kw == 1 else _SHORT if channels < _FEW_CHANNELS else _SHORT_CONV
    if groups > 1 or positions > few or not grad.numel() or not score.numel():
        accumulate.add_conv(score, grad, x, stride, padding, dilation, groups, power)
        return
    total = torch.zeros((num_out, kh * kw * channels))  # channels last: longer runs to read
    step = max(1, _HELD // (x[0].numel() + grad[0].numel()))
    for g, a in zip(grad.split(step), x.split(step), strict=True):
        g, a = g.float(), padded(a, padding, channels_last=True)
        seen = windows(a, score, g, stride, dilation, 0, 1).permute(0, 1, 5, 6, 3, 4, 2)
        by_row = g.permute(0, 2, 3, 1)
        if positions == 1:
            rows = by_row.flatten(1), seen.reshape(len(g), -1)
            accumulate.add_linear(total, *rows, None, None, power)
            continue
        ends = torch.arange(1, len(g) + 1) * positions
        _add(
            total,
            (g, _offsets(by_row, 3), _offsets(by_row[0, 0, 0], 1)),
            (a, _offsets(seen.flatten(0, 1), 3), _offsets(seen[0, 0, 0, 0], 3)),
            ends - positions,
            ends,
            power,
        )
    score += total.view(num_out, kh, kw, channels).permute(0, 3, 1, 2)


def _offsets(tensor: Tensor, dims: int) -> Tensor:
    """Return where the elements along the first dims are, from the first one."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, step in zip(tensor.shape[:dims], tensor.stride()[:dims], strict=True):
        offsets = offsets[..., None] + torch.arange(size) * step
    return offsets.flatten()


def _steps(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return _offsets(matrix, 1), _offsets(matrix.T, 1)


_Operand = tuple[Tensor, Tensor, Tensor]  # memory, offsets of rows, offsets of columns


def _add(
    score: Tensor, grad: _Operand, x: _Operand, starts: Tensor, ends: Tensor, power: int
) -> None:
    starts, ends = starts.contiguous(), ends.contiguous()
    _backend.compiled().fisher_linear_cpu(
        score.data_ptr(),
        [t.data_ptr() for t in grad],
        [t.data_ptr() for t in x],
        starts.data_ptr(),
        ends.data_ptr(),
        sizes=(*score.shape, len(starts), score.stride(0)),
        power=power,
        num_threads=_backend.num_threads(score.numel() * len(grad[1]) * _TIME),
    )
