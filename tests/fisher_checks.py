"""Scores a case, judges the scores by a loop over single samples, and compares a model's state."""

from __future__ import annotations

import fnmatch
import itertools

import numpy as np
import oracle
import torch

import fishfast as ff
from fishfast.fisher.engine.scorer import THROUGH

BATCH = (torch.randn(4, 6, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 3]))


def score(case, **options):
    return ff.estimate_fisher(case.model, case.batches, loss_fn=case.loss_fn, **options)


def samples_of(case, batch):
    """Return the batch as batches of one."""
    taken = (case.take(batch, b) for b in itertools.count())
    return list(itertools.takewhile(lambda one: one is not None, taken))


def truth(case, dtype=torch.float64, **options):
    model = case.plain(case.model) if case.plain else case.model
    return oracle.fisher_by_loop(
        model, case.batches, case.loss_fn, case.take, dtype=dtype, **options
    )  # fmt: skip


def assert_as_exact_as_a_loop(fisher, exact, plain, power=2, rounding=1e-6):
    """Error against float64 at most twice that of a loop over samples in plain torch.

    Two allowances for rounding, where the loop happens to be lucky. ``rounding``: 16 units in the
    last place of fp32 on a tensor's norm, for sums that are added in another order through the
    layers above. And gradients that cancel to zero (a key bias under softmax) are rounding alone,
    of 1e-6 times the largest gradient.
    """
    assert list(fisher) == list(exact)
    largest = max(np.abs(values).max(initial=0) for values in exact.values())
    cancelled = largest * (1e-12 if power == 2 else 1e-6)
    for name, found in fisher.items():
        assert found.dtype == torch.float32
        assert tuple(found.shape) == exact[name].shape
        error = np.linalg.norm(found.double().numpy() - exact[name])
        allowed = 2 * np.linalg.norm(plain[name] - exact[name])
        allowed += rounding * np.linalg.norm(exact[name]) + cancelled * found.numel() ** 0.5
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def assert_roads(fisher, case):
    """Every parameter is caught in the way that the case says, and the report says so."""
    assert set(fisher.fallback) == case.fallback
    for name, road in fisher.roads.items():
        if name in case.fallback:
            assert road == f"one sample at a time: {fisher.fallback[name]}"
        else:
            assert fnmatch.fnmatch(road.removesuffix(THROUGH), case.road(name)), f"{name}: {road}"
    assert (fisher.passes["fallback"] > 0) == bool(case.fallback)


def state_of(model):
    """All that a refusal or a call must leave as it was; tensors by identity, version and value."""
    return {
        "modes": [module.training for module in model.modules()],
        "tensors": [
            (name, id(t), t._version, t.requires_grad, t.detach().clone())
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        ],
        "grads": [
            (id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()
        ],
        "hooks": [
            [len(value) for name, value in vars(module).items() if "hooks" in name]
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "overrides": torch._C._len_torch_function_stack(),
        "multithreading": torch._C._is_multithreading_enabled(),
    }


def assert_same_state(before, after):
    flat_before, flat_after = (torch.utils._pytree.tree_leaves(state) for state in (before, after))
    assert len(flat_before) == len(flat_after)
    for old, new in zip(flat_before, flat_after, strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


def decorated(case):
    """Give a model everything that could be lost: mixed modes, gradients, hooks, and more."""
    model = case.model.train()
    for module in list(model.modules())[1::2]:
        module.eval()
    seen = []
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    next(model.modules()).register_forward_hook(lambda *_: seen.append(1))
    trainable = [p for p in model.parameters() if p.requires_grad]
    trainable[0].register_post_accumulate_grad_hook(lambda *_: seen.append("grad"))
    return model, seen
