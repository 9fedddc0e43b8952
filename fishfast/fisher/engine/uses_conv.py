"""One use of a convolution's weight: G against the windows of the input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.uses import Use

__all__ = ["ConvUse", "Window"]

# fp32 values (256 MB) of a 3-d convolution's input that are held once for each of its planes.
_HELD = 2**26


class Window(NamedTuple):
    """How a convolution goes over its input; sizes by dim."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class ConvUse(Use):
    """A convolution's weight gradient: G against the windows of the input, group by group.

    Args:
        rows: which sample each image belongs to.
        grad: ``[N, O, *positions]``.
        x: ``[N, C, *positions]``.
        shape: the weight's, ``[O, C / groups, *kernel]``.
        window: how it goes over the input.
    """

    def __init__(
        self, rows: Rows, grad: Tensor, x: Tensor, shape: torch.Size, window: Window
    ) -> None:
        super().__init__(rows)
        dtype = torch.promote_types(grad.dtype, x.dtype)
        dtype = torch.float32 if dtype == torch.float64 else dtype
        self.grad, self.x, self.shape, self.window = grad.to(dtype), x.to(dtype), shape, window

    def add_to(self, score: Tensor, add: Accumulator) -> None:
        """Add the f's of all samples to ``score``, the weight's shape."""
        grad, x = self.rows.by_sample(self.grad), self.rows.by_sample(self.x)
        volumes = len(self.shape) == 5
        if grad is None or x is None or (volumes and not score.is_contiguous()):
            for grads in self.grads():
                add.add_samples(score, grads)
            return
        step = max(1, _HELD // max(1, x[0].numel() * self.shape[2])) if volumes else len(x)
        for g, a in zip(grad.split(step), x.split(step), strict=True):
            kernel, g, a, window = _in_2d(score, g, a, self.window)
            if g.shape[1] == 1:
                g, a = g.squeeze(1), a.squeeze(1)
            else:
                g, a, window = _stacked(kernel, g, a, window)
            add.add_conv(kernel, g, a, *window)

    def grads(self) -> Iterator[Tensor]:
        """Yield one sample's gradient at a time; a sample may have several images."""
        dims = len(self.shape) - 2
        for grad, x in zip(self.rows.split(self.grad), self.rows.split(self.x), strict=True):
            _, weight, _ = torch.ops.aten.convolution_backward(
                grad.float(), x.float(), x.new_empty(self.shape, dtype=torch.float32), None,
                self.window.stride, self.window.padding, self.window.dilation,
                False, [0] * dims, self.window.groups, [False, True, False],
            )  # fmt: skip
            yield weight.unsqueeze(0)


def _in_2d(
    score: Tensor, grad: Tensor, x: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor, Window]:
    """Return a convolution in 1 or 3 dims as one in 2 dims.

    A line is an image of height 1. A volume is an image for each plane of the output, whose
    channels are those of all the planes of the input that the plane sees.

    Args:
        score: ``[O, C / groups, *kernel]``.
        grad: ``[B, F, O, *positions]``, F images a sample.
        x: ``[B, F, C, *positions]``.
        window: of the convolution.

    Returns:
        The same with kernels and positions in 2 dims; the score is a view.
    """
    stride, padding, dilation, groups = window
    if len(stride) == 1:
        window = Window((1, *stride), (0, *padding), (1, *dilation), groups)
        return score.unsqueeze(2), grad.unsqueeze(3), x.unsqueeze(3), window
    if len(stride) == 3:
        x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
        seen = (grad.shape[3] - 1) * stride[0] + 1
        starts = range(0, score.shape[2] * dilation[0], dilation[0])
        planes = [x[:, :, :, start : start + seen : stride[0]] for start in starts]
        # [B, F, C, kd, D', H, W] -> [B, F D', C kd, H, W]
        x = torch.stack(planes, 3).movedim(4, 2).flatten(3, 4).flatten(1, 2)
        grad = grad.movedim(3, 2).flatten(1, 2)
        window = Window(stride[1:], padding[1:], dilation[1:], groups)
        score = score.view(len(score), -1, *score.shape[3:])
    return score, grad, x, window


def _stacked(
    score: Tensor, grad: Tensor, x: Tensor, window: Window
) -> tuple[Tensor, Tensor, Window]:
    """Return a sample's images as one, each under the one before.

    Windows that see two images have no gradient: ``[B, F, O, H', W']`` gets rows of zeros.
    """
    (stride, _), (above, left), (dilation, _), _ = window
    uneven = -(x.shape[3] + 2 * above) % stride
    x = F.pad(x, (left, left, above, above + uneven))
    grad = F.pad(grad, (0, 0, 0, x.shape[3] // stride - grad.shape[3]))
    x, grad = (t.transpose(1, 2).flatten(2, 3) for t in (x, grad))
    whole = (x.shape[2] - dilation * (score.shape[2] - 1) - 1) // stride + 1
    return grad[:, :, :whole], x, window._replace(padding=(0, 0))
