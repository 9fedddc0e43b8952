"""Whole small models drawn at random: what `test_fisher_random_models` scores.

A model is a list of blocks on hidden states ``[B, T, WIDTH]`` and a head with one loss per sample.
Every size is small and often equal to another one (B to T, to WIDTH, to the number of classes), so
that whoever takes a dim for the samples by its size is wrong. Samples never mix.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import Case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, TOKENS = 4, 5


class Block(nn.Module):
    """One operation on hidden states; ``run(self, x, batch)``."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, nn.Parameter | nn.Module) or not isinstance(part, Tensor):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self.run(self, x, batch)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(shape))


# ---- layers -------------------------------------------------------------------------------------


def linear(draw):
    order = draw.choice(["plain", "time first", "flat", "addmm", "matmul"])

    def run(self, x, batch):
        if order == "time first":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        if order == "flat":
            return self.layer(x.flatten(0, 1)).view_as(x)
        if order == "addmm":
            flat = torch.addmm(self.layer.bias, x.reshape(-1, WIDTH), self.layer.weight)
            return flat.view_as(x)
        if order == "matmul":
            return x @ self.layer.weight
        return self.layer(x)

    return Block(run, layer=nn.Linear(WIDTH, WIDTH))


def conv(draw):
    groups = draw.choice([1, 2])
    layer = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=groups)
    return Block(lambda self, x, _: self.layer(x.transpose(1, 2)).transpose(1, 2), layer=layer)


def norm(draw):
    kind = draw.choice(["layer", "rms", "group", "batch"])

    def run(self, x, batch):
        if kind in {"layer", "rms"}:
            return self.layer(x)
        return self.layer(x.transpose(1, 2).contiguous()).transpose(1, 2)

    layers = {
        "layer": lambda: nn.LayerNorm(WIDTH), "rms": lambda: nn.RMSNorm(WIDTH, eps=0.1),
        "group": lambda: nn.GroupNorm(2, WIDTH, eps=0.1), "batch": lambda: nn.BatchNorm1d(WIDTH),
    }  # fmt: skip
    return Block(run, layer=layers[kind]())


def attention(draw):
    kind = draw.choice(["module", "time first", "encoder", "by hand"])
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 6, dropout=0, activation="gelu", batch_first=True
        )
        return Block(lambda self, x, _: self.layer(x), layer=layer)
    if kind == "by hand":

        def run(self, x, batch):
            heads = self.layer(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(*heads, is_causal=True)
            return self.out(out.transpose(1, 2).flatten(2))

        return Block(run, layer=nn.Linear(WIDTH, 3 * WIDTH), out=nn.Linear(WIDTH, WIDTH))

    def run(self, x, batch):
        x = x.transpose(0, 1) if kind == "time first" else x
        out, _ = self.layer(x, x, x, need_weights=draw_weights)
        return out.transpose(0, 1) if kind == "time first" else out

    draw_weights = draw.random() < 0.5
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=kind == "module")
    return Block(run, layer=layer)


def recurrent(draw):
    kind = draw.choice(["gru", "lstm", "cell", "vector"])
    if kind in {"gru", "lstm"}:
        layer = (nn.GRU if kind == "gru" else nn.LSTM)(WIDTH, WIDTH, batch_first=True)
        return Block(lambda self, x, _: self.layer(x)[0], layer=layer)

    def run(self, x, batch):
        hidden, out = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1):
            mixed = hidden * self.gate if kind == "vector" else self.layer(hidden)
            hidden = torch.tanh(step + mixed)
            out.append(hidden)
        return torch.stack(out, 1)

    return Block(run, layer=nn.Linear(WIDTH, WIDTH), gate=weight(WIDTH))


def tables(draw):
    kind = draw.choice(["tokens", "positions", "looked up", "class token", "prelu", "index"])

    def run(self, x, batch):
        if kind == "tokens":
            return x + self.table(batch["tokens"])
        if kind == "index":
            return x * self.table.weight[batch["tokens"]]
        if kind == "positions":
            return x + self.positions[: x.shape[1]]
        if kind == "looked up":
            return x + F.embedding(torch.arange(x.shape[1]), self.positions)
        if kind == "class token":
            return x + torch.cat([self.positions[:1].expand(len(x), 1, -1), x[:, :-1]], 1)
        return F.prelu(x, self.slope)

    return Block(
        run, table=nn.Embedding(TOKENS, WIDTH), positions=weight(8, WIDTH), slope=weight(1)
    )


# ---- adapters -----------------------------------------------------------------------------------


def adapter(draw):
    kind = draw.choice(["lora", "product", "reflection", "scale", "hyper", "norm", "written"])

    def run(self, x, batch):
        if kind == "lora":
            return F.linear(x, self.base + self.b @ self.a)
        if kind == "product":
            return F.linear(x, self.base) + F.linear(F.linear(x, self.a), self.b)
        if kind == "reflection":
            u = self.v / self.v.norm()
            return F.linear(
                x, self.base @ (torch.eye(WIDTH, dtype=x.dtype) - 2 * torch.outer(u, u))
            )
        if kind == "scale":
            return F.linear(x, self.base) * self.v
        if kind == "hyper":
            return F.linear(x, self.made(self.codes).view(WIDTH, WIDTH))
        if kind == "norm":
            return F.linear(x, F.normalize(self.full, dim=1) * self.v[:, None])
        full = self.base.clone()
        full[0] = self.v
        return F.linear(x, full)

    return Block(
        run, base=0.5 * torch.randn(WIDTH, WIDTH), a=weight(2, WIDTH), b=weight(WIDTH, 2),
        v=weight(WIDTH), full=weight(WIDTH, WIDTH), made=nn.Linear(3, WIDTH),
        codes=torch.randn(WIDTH, 3),
    )  # fmt: skip


# ---- samples in another order -------------------------------------------------------------------

MOVES: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "list": lambda h, order: torch.stack([list(h)[i] for i in order]),
    "split": lambda h, order: torch.cat([h.split(1)[i] for i in order]),
    "unbind": lambda h, order: torch.stack([h.unbind()[i] for i in order]),
    "select": lambda h, order: torch.stack([h[i] for i in order]),
    "slice": lambda h, order: torch.cat([h[i : i + 1] for i in order]),
    "index": lambda h, order: h[torch.tensor(order)],
    "index_select": lambda h, order: h.index_select(0, torch.tensor(order)),
    "gather": lambda h, order: h.gather(0, torch.tensor(order)[:, None, None].expand_as(h)),
    "time first": lambda h, order: h.transpose(0, 1)[:, order].transpose(0, 1),
    "product": lambda h, order: torch.einsum(
        "bc,ctw->btw", torch.eye(len(h), dtype=h.dtype)[order], h
    ),
}


def reordered(draw):
    move = MOVES[draw.choice(sorted(MOVES))]

    def run(self, x, batch):
        order = batch["order"].tolist() if len(x) > 1 else [0]
        back = sorted(range(len(order)), key=order.__getitem__)
        inside = move(torch.tanh(self.layer(x)), order)
        return move(torch.tanh(self.layer(inside)), back)

    return Block(run, layer=nn.Linear(WIDTH, WIDTH))


def one_by_one(draw):
    kind = draw.choice(["list", "map", "routed", "routed twice"])

    def run(self, x, batch):
        if kind == "list":
            return torch.cat([self.layer(x[b : b + 1]) for b in range(len(x))])
        if kind == "map":
            return torch.stack([self.layer(row) for row in x.unbind()])
        chosen = batch["route"]
        out = torch.zeros_like(x).index_put((chosen,), self.layer(x[chosen]))
        if kind == "routed twice":
            out = out.index_put((~chosen,), self.other(x[~chosen]))
        return out

    return Block(run, layer=nn.Linear(WIDTH, WIDTH), other=nn.Linear(WIDTH, WIDTH))


# ---- hooks --------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "halved": lambda grad: grad / 2,
    "length": lambda grad: grad / (grad.norm() + 1e-3),
    "clipped": lambda grad: grad * (0.1 / (grad.norm() + 1e-8)).clamp(max=1),
    "values": lambda grad: grad.clamp(-0.02, 0.02),
    "rows": lambda grad: grad / (grad.norm(dim=-1, keepdim=True) + 1e-2),
}


class Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def hooked(draw):
    change, way = CHANGES[draw.choice(sorted(CHANGES))], draw.choice(["hook", "function", "module"])

    def run(self, x, batch):
        hidden = torch.tanh(self.layer(x))
        if way == "function":
            return Changed.apply(hidden, change)
        if way == "module":
            module = nn.Identity()
            module.register_full_backward_hook(lambda _, grads, __: (change(grads[0]),))
            return module(hidden)
        hidden.register_hook(change)
        return hidden

    return Block(run, layer=nn.Linear(WIDTH, WIDTH))


def equilibrium(draw):
    one_time = draw.random() < 0.5

    def run(self, x, batch):
        def cell(z):
            return torch.tanh(0.3 * self.layer(z) + x)

        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(30):
                z = cell(z)
        start = z.requires_grad_()
        out, busy = cell(start), []

        def solve(grad):
            if one_time:
                handle.remove()
            if busy:
                return None
            busy.append(1)
            result = grad
            for _ in range(30):
                (part,) = torch.autograd.grad(out, start, result, retain_graph=True)
                result = grad + part
            busy.clear()
            return result

        handle = out.register_hook(solve)
        return out

    return Block(run, layer=nn.Linear(WIDTH, WIDTH))


BLOCKS = [
    linear, linear, conv, norm, attention, recurrent, tables, adapter, reordered, one_by_one,
    hooked, equilibrium,
]  # fmt: skip

# ---- heads --------------------------------------------------------------------------------------


def classes(draw, count):
    return Block(lambda self, h, _: self.layer(h.mean(1)), layer=nn.Linear(WIDTH, count)), classify


def prototypes(draw, count):
    kind = draw.choice(["cdist", "matmul", "einsum", "differences", "computed"])

    def run(self, h, batch):
        h, p = h.mean(1), self.prototypes
        if kind == "computed":
            p = self.made(p)
        if kind == "cdist":
            return torch.cdist(h, p)
        if kind == "einsum":
            return torch.einsum("bd,kd->bk", h, p)
        if kind == "differences":
            return (h[:, None] - p[None]).square().sum(2)
        return h @ p.T

    loss = classify if draw.random() < 0.3 else own_class
    return Block(run, prototypes=weight(count, WIDTH), made=nn.Linear(WIDTH, WIDTH)), loss


def tokens(draw, count):
    return Block(lambda self, h, _: self.layer(h), layer=nn.Linear(WIDTH, TOKENS)), next_tokens


def one_each(draw, count):
    """A list of samples' losses, as detection models have it."""
    head = Block(lambda self, h, _: torch.stack([self.layer(row.mean(0)) for row in h]),
                 layer=nn.Linear(WIDTH, count))  # fmt: skip
    return head, classify


def classify(out, batch):
    return F.cross_entropy(out, batch["labels"], reduction="none")


def own_class(out, batch):
    return out.gather(1, batch["labels"][:, None]).squeeze(1).square()


def next_tokens(out, batch):
    losses = F.cross_entropy(out.transpose(1, 2), batch["tokens"], reduction="none")
    return (losses * batch["counted"]).sum(1)


HEADS = [classes, classes, prototypes, tokens, one_each]


class Drawn(nn.Module):
    """Blocks, some of them twice, each with or without a residual or a checkpoint; and a head."""

    def __init__(self, draw: random.Random, count: int) -> None:
        super().__init__()
        made = [draw.choice(BLOCKS)(draw) for _ in range(draw.randint(1, 4))]
        self.blocks = nn.ModuleList(made)
        self.order = [*range(len(made)), *draw.sample(range(len(made)), draw.choice([0, 0, 1]))]
        self.residual = [draw.random() < 0.5 for _ in self.order]
        self.checkpointed = [draw.random() < 0.15 for _ in self.order]
        self.head, self.loss = draw.choice(HEADS)(draw, count)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = batch["x"]
        for place, residual, again in zip(
            self.order, self.residual, self.checkpointed, strict=True
        ):
            block = self.blocks[place]
            result = (
                checkpoint(block, hidden, batch, use_reentrant=False)
                if again
                else (block(hidden, batch))
            )
            hidden = torch.tanh(hidden + result if residual else result)
        return self.loss(self.head(hidden, batch), batch)


def draw_case(seed: int) -> Case:
    """Return the model and the batches of a seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    count = draw.choice([2, 3, 4])
    length = draw.choice([2, 3, 4])
    sizes = [draw.choice([1, 2, 3, WIDTH, length, count, 6]) for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.3:
        sizes = [sizes[0]] * 5
    model = Drawn(draw, count)
    batches = [draw_batch(draw, size, length, count) for size in sizes]
    return Case(model, batches, lambda model, batch: model(batch))


def draw_batch(draw: random.Random, size: int, length: int, count: int) -> dict[str, Tensor]:
    order = list(range(size))
    if draw.random() < 0.6:
        draw.shuffle(order)
    labels = torch.randint(0, count, (size,))
    if draw.random() < 0.4:  # one sample of each class, in order
        labels = torch.arange(size) % count
    return {
        "x": torch.randn(size, length, WIDTH), "tokens": torch.randint(0, TOKENS, (size, length)),
        "labels": labels, "order": torch.tensor(order),
        "route": torch.rand(size, length) < 0.5, "counted": torch.rand(size, length) < 0.7,
    }  # fmt: skip
