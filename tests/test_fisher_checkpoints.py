"""Selective activation checkpoints, and other contexts of a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import threading

import pytest
import torch
from fisher_checks import (
    BATCH,
    assert_as_exact_as_a_loop,
    assert_same_state,
    score,
    state_of,
    truth,
)
from models import Calls, Case, classify
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fishfast as ff

PRODUCTS = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]


def every_second(ctx, op, *args, counted=None, **kwargs):
    """The policy of torchtitan: every second product is kept."""
    if op in PRODUCTS:
        counted[ctx.is_recompute] += 1
        if counted[ctx.is_recompute] % 2:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def of_list():
    return create_selective_checkpoint_contexts(PRODUCTS)


def of_policy():
    counted = {True: 0, False: 0}
    return create_selective_checkpoint_contexts(functools.partial(every_second, counted=counted))


def of_all():
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)


def no_selection():
    return contextlib.nullcontext(), contextlib.nullcontext()


def block(wide=6):
    return nn.Sequential(nn.Linear(6, wide), nn.GELU(), nn.LayerNorm(wide), nn.Linear(wide, 6))


def run(self, x, context_fn):
    for layers in self.blocks:
        x = checkpoint(layers, x, use_reentrant=False, context_fn=context_fn)
    return self.out(x)


def nested(self, x, context_fn):
    def inner(x):
        return checkpoint(self.blocks[1], x, use_reentrant=False, context_fn=context_fn)

    return self.out(checkpoint(lambda x: inner(self.blocks[0](x)), x, use_reentrant=False))


def net(way, context_fn):
    torch.manual_seed(0)
    return Calls(
        functools.partial(way, context_fn=context_fn),
        blocks=nn.ModuleList([block(), block(8)]), out=nn.Linear(6, 4),
    )  # fmt: skip


@pytest.mark.parametrize("way", [run, nested])
@pytest.mark.parametrize("context_fn", [of_list, of_policy, of_all, no_selection])
@pytest.mark.parametrize("power", [2, 1])
def test_selective_checkpoints_are_exact(context_fn, way, power):
    case = Case(net(way, context_fn), [BATCH, (BATCH[0][:3] * 2, BATCH[1][:3])], classify)
    fisher = score(case, power=power)
    exact, loop = (truth(case, t, power=power) for t in (torch.float64, torch.float32))
    assert_as_exact_as_a_loop(fisher, exact, loop, power)
    assert not fisher.fallback


def test_a_layer_left_to_autograd_inside_one():
    model = net(run, of_list)
    model.blocks[0][1] = nn.PReLU(init=0.3)
    case = Case(model, [BATCH], classify)
    fisher = score(case)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))


def test_contexts_of_a_users_own_are_entered():
    entered = []

    @contextlib.contextmanager
    def noted(which):
        entered.append(which)
        yield

    ff.estimate_fisher(
        net(run, lambda: (noted("forward"), noted("again"))), [BATCH], loss_fn=classify
    )
    assert set(entered) == {"forward", "again"}


def test_another_thread_trains_with_selective_checkpoints_meanwhile():
    """What it keeps is kept: its layers run again without their products."""
    training = net(run, of_list)
    forward_done, scored, counted = threading.Event(), threading.Event(), []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func in PRODUCTS[:1])
            return func(*args, **(kwargs or {}))

    def train():
        losses = classify(training, BATCH)
        forward_done.set()
        scored.wait()
        with Counting():
            losses.sum().backward()

    def loss_fn(model, batch):
        if not forward_done.is_set():
            thread.start()
            forward_done.wait()
        return classify(model, batch)

    thread = threading.Thread(target=train)
    model = net(run, of_list)
    before = state_of(model)
    ff.estimate_fisher(model, [BATCH], loss_fn=loss_fn)
    scored.set()
    thread.join()
    assert_same_state(before, state_of(model))
    assert sum(counted) == 0
    assert all(p.grad is not None for p in training.parameters())
