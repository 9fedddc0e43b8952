"""Small models put together from a list of steps: what `test_fisher_random_graphs` draws.

A step is one operation on hidden states ``[B, T, WIDTH]``, run with its rows in some order (time
first, flattened, in windows, one step or one sample at a time, routed), shared with other steps
where the slot is the same. All of it is plain torch: samples never mix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, TOKENS, LONGEST = 4, 5, 4


class Step(NamedTuple):
    """One operation of a model; steps of equal ``op`` and ``slot`` share their weights."""

    op: str
    order: str = "plain"
    slot: int = 0
    residual: bool = False
    checkpointed: bool = False


Batch = tuple[Tensor, Tensor, Tensor]  # hidden states, tokens, and which rows are routed


def draw_batch(samples: int, length: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, length)
    return (
        torch.randn(*shape, WIDTH, generator=generator),
        torch.randint(0, TOKENS, shape, generator=generator),
        torch.rand(shape, generator=generator) < 0.5,
    )


# ---- operations: op(weights, x, tokens), x [..., WIDTH] -----------------------------------------

Op = Callable[[nn.ParameterDict, Tensor, Tensor], Tensor]
SQUARE, ROW = (WIDTH, WIDTH), (WIDTH,)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).flatten(0, -2).sum(0)


def channels_second(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # Contiguous: torch 2.13 crashes in the backward of group_norm on a channels-last [B, 4, 2, 1].
    return lambda x: norm(x.movedim(-1, 1).contiguous()).movedim(1, -1)


def one_row_written(p: nn.ParameterDict, x: Tensor) -> Tensor:
    weight = p["w"].clone()
    weight[1] = p["b"]
    weight[2:].mul_(p["c"])
    return F.linear(x, weight)


def batch_norm(p: nn.ParameterDict, x: Tensor) -> Tensor:
    mean = torch.linspace(-1, 1, WIDTH, dtype=x.dtype)
    return channels_second(lambda c: F.batch_norm(c, mean, mean.exp(), p["w"], p["b"]))(x)


def conv(p: nn.ParameterDict, x: Tensor) -> Tensor:
    """Convolve over the dims between the first and the last."""
    weight = p["w"] if x.dim() == 3 else p["w"].unsqueeze(2).expand(-1, -1, 3, -1)
    run = F.conv1d if x.dim() == 3 else F.conv2d
    return channels_second(lambda c: run(c, weight, p["b"], padding=1))(x)


def class_token(p: nn.ParameterDict, x: Tensor) -> Tensor:
    first = p["w"].expand(len(x), 1, -1)
    return x + torch.cat([first, x[:, :-1]], 1)


def addmm(p: nn.ParameterDict, x: Tensor) -> Tensor:
    return torch.addmm(p["b"], x.reshape(-1, WIDTH), p["w"]).view_as(x)


# Name -> shapes of the weights, and the operation.
OPS: dict[str, tuple[dict[str, tuple[int, ...]], Op]] = {
    "linear": ({"w": SQUARE, "b": ROW}, lambda p, x, _: F.linear(x, p["w"], p["b"])),
    "matmul": ({"w": SQUARE}, lambda p, x, _: x @ p["w"]),
    "matmul transposed": ({"w": SQUARE}, lambda p, x, _: x @ p["w"].T),
    "from the left": ({"w": SQUARE}, lambda p, x, _: (p["w"] @ x.unsqueeze(-1)).squeeze(-1)),
    "both ways": ({"w": SQUARE}, lambda p, x, _: F.linear(x, p["w"]).tanh() @ p["w"]),
    "addmm": ({"w": SQUARE, "b": ROW}, lambda p, x, _: addmm(p, x)),
    "einsum": ({"w": SQUARE}, lambda p, x, _: torch.einsum("...i,io->...o", x, p["w"])),
    "rows of a stack": (
        {"w": (3 * WIDTH, WIDTH), "b": (3, WIDTH)},
        lambda p, x, _: F.linear(F.linear(x, p["w"][:WIDTH], p["b"][0]), p["w"][WIDTH:-WIDTH]),
    ),
    "columns that overlap": (
        {"w": (WIDTH, WIDTH + 2)},
        lambda p, x, _: F.linear(F.linear(x, p["w"][:, 2:]).tanh(), p["w"][:, 1:-1]),
    ),
    "windows of a vector": (
        {"w": (2 * WIDTH,)}, lambda p, x, _: F.linear(x, p["w"].unfold(0, WIDTH, 1)[:WIDTH]),
    ),
    "low rank": (
        {"w": SQUARE, "a": (2, WIDTH), "b": (WIDTH, 2)},
        lambda p, x, _: F.linear(x, p["w"] + p["b"] @ p["a"]),
    ),
    "normed weight": (
        {"w": SQUARE, "b": ROW}, lambda p, x, _: F.linear(x, F.normalize(p["w"]) * p["b"]),
    ),
    "rows written": ({"w": SQUARE, "b": ROW, "c": (1,)}, lambda p, x, _: one_row_written(p, x)),
    "layer norm": ({"w": ROW, "b": ROW}, lambda p, x, _: F.layer_norm(x, ROW, p["w"], p["b"])),
    "rms norm": ({"w": ROW}, lambda p, x, _: F.rms_norm(x, ROW, 1 + p["w"], 1e-2)),
    "rms norm by hand": (
        {"w": ROW},
        lambda p, x, _: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1) * p["w"],
    ),
    "batch norm": ({"w": ROW, "b": ROW}, lambda p, x, _: batch_norm(p, x)),
    "group norm": (
        {"w": ROW, "b": ROW},
        lambda p, x, _: channels_second(lambda c: F.group_norm(c, 2, p["w"], p["b"]))(x),
    ),
    "conv": ({"w": (WIDTH, WIDTH, 3), "b": ROW}, lambda p, x, _: conv(p, x)),
    "shift": ({"w": ROW}, lambda p, x, _: x + p["w"]),
    "shift by one number": ({"w": ()}, lambda p, x, _: p["w"] - x),
    "gate": ({"w": (1, 1), "b": ROW}, lambda p, x, _: x * p["w"].sigmoid() / p["b"].exp()),
    "choice": ({"w": ROW}, lambda p, x, _: torch.where(x > 0, x, p["w"] * x)),
    "prelu": ({"w": (1,)}, lambda p, x, _: F.prelu(x, p["w"])),
    "custom function": ({"w": ROW}, lambda p, x, _: Scale.apply(x, p["w"].exp())),
    "positions": ({"w": (LONGEST, WIDTH)}, lambda p, x, _: x + p["w"][: x.shape[1]]),
    "positions looked up": (
        {"w": (LONGEST, WIDTH)},
        lambda p, x, _: x + F.embedding(torch.arange(x.shape[1]).unsqueeze(0), p["w"]),
    ),
    "class token": ({"w": (1, 1, WIDTH)}, lambda p, x, _: class_token(p, x)),
    "embedding": ({"w": (TOKENS, WIDTH)}, lambda p, x, t: x + F.embedding(t, p["w"])),
    "rows indexed": ({"w": (TOKENS, WIDTH)}, lambda p, x, t: x * p["w"][t]),
    "weight indexed": (
        {"w": (TOKENS, WIDTH, WIDTH)},
        lambda p, x, t: (x.unsqueeze(-2) @ p["w"][t]).squeeze(-2),
    ),
    "tied": (
        {"w": (TOKENS, WIDTH)},
        lambda p, x, t: F.linear(x, p["w"]).softmax(-1) @ p["w"] + F.embedding(t, p["w"]),
    ),
}  # fmt: skip

# ---- orders of rows -----------------------------------------------------------------------------


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)


# Name -> how hidden states and tokens are rearranged, and how the result is put back as [B, T, W].
REARRANGED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "plain": (lambda t: t, lambda y, x: y),
    "time first": (lambda t: t.transpose(0, 1), lambda y, x: y.transpose(0, 1)),
    "flat": (flat, lambda y, x: y.view_as(x)),
    "flat, time first": (
        lambda t: flat(t.transpose(0, 1)),
        lambda y, x: y.unflatten(0, (x.shape[1], -1)).transpose(0, 1),
    ),
    "windows": (
        lambda t: flat(t.unflatten(1, (2, -1))), lambda y, x: y.unflatten(0, (-1, 2)).flatten(1, 2)
    ),
    "grid": (lambda t: t.unflatten(1, (2, -1)), lambda y, x: y.flatten(1, 2)),
    "backwards": (lambda t: t.flip(0), lambda y, x: y.flip(0)),
}  # fmt: skip
ORDERS = [*REARRANGED, "step by step", "sample by sample", "routed", "routed by index"]
# What looks at dim 1 as time cannot have its rows in any order.
NEEDS_TIME = {"positions", "positions looked up", "class token"}
ORDERS_WITH_TIME = ["plain", "sample by sample", "backwards"]
ORDERS_OF_CONV = ["plain", "sample by sample", "windows", "grid", "backwards"]
# These look at the dims between the first and the last as an image.
ORDERS_OF_IMAGES = dict.fromkeys(["conv", "group norm", "batch norm"], ORDERS_OF_CONV)


def orders_of(op: str) -> list[str]:
    """Return the orders in which an operation does not mix samples."""
    return ORDERS_WITH_TIME if op in NEEDS_TIME else ORDERS_OF_IMAGES.get(op, ORDERS)


def in_order(
    order: str, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, batch: Batch
) -> Tensor:
    """Run an operation with its rows in some order."""
    _, tokens, route = batch
    if order in REARRANGED:
        there, back = REARRANGED[order]
        return back(run(there(x), there(tokens)), x)
    if order == "step by step":
        return torch.stack([run(x[:, t], tokens[:, t]) for t in range(x.shape[1])], 1)
    if order == "sample by sample":
        return torch.cat([run(x[b : b + 1], tokens[b : b + 1]) for b in range(len(x))])
    if order == "routed":
        return torch.zeros_like(x).index_put((route,), run(x[route], tokens[route]))
    rows = flat(route).nonzero().squeeze(1).flip(0)
    part = run(flat(x)[rows], flat(tokens)[rows])
    return torch.zeros_like(flat(x)).index_add(0, rows, part).view_as(x)


class Graph(nn.Module):
    """The steps, one after the other."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.weights = nn.ModuleDict()
        generator = torch.Generator().manual_seed(0)
        for step in steps:
            shapes, _ = OPS[step.op]
            if self.name(step) not in self.weights:
                self.weights[self.name(step)] = nn.ParameterDict({
                    name: nn.Parameter(0.6 * torch.randn(shape, generator=generator))
                    for name, shape in shapes.items()
                })  # fmt: skip

    def name(self, step: Step) -> str:
        return f"{step.op} {step.slot}"

    def forward(self, batch: Batch) -> Tensor:
        hidden = batch[0]
        for step in self.steps:
            _, op = OPS[step.op]
            weights = self.weights[self.name(step)]

            def run(x: Tensor, step: Step = step, op: Op = op, weights: Any = weights) -> Tensor:
                return in_order(step.order, lambda x, t: op(weights, x, t), x, batch)

            result = (
                checkpoint(run, hidden, use_reentrant=False) if step.checkpointed else run(hidden)
            )
            hidden = torch.tanh(hidden + result if step.residual else result)
        return hidden
