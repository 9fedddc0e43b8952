"""`estimate_fisher` on random small graphs, against a loop over single samples in float64."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import assert_as_exact_as_a_loop, assert_same_state, score, state_of, truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Case
from random_graphs import OPS, Graph, Step, draw_batch, orders_of


# The same graphs in every run, so that a failure is there again; no times that depend on a machine.
def fixed(examples):
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


def loss_fn(model, batch):
    out = model(batch)
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view_as(out[0])
    return (out * weights + out.square()).flatten(1).sum(1)


def loss_of_some(model, batch):
    """Samples that begin with token 0 have no gradient."""
    return loss_fn(model, batch) * (batch[1][:, 0] != 0)


@st.composite
def steps(draw):
    op = draw(st.sampled_from(sorted(OPS)))
    return Step(
        op, draw(st.sampled_from(orders_of(op))), draw(st.integers(0, 1)), draw(st.booleans()),
        draw(st.sampled_from([False, False, False, True])),
    )  # fmt: skip


sizes = st.tuples(st.sampled_from([2, 3, 1, 5]), st.sampled_from([4, 2]))
batches = st.tuples(st.lists(sizes, min_size=1, max_size=3), st.integers(0, 9)).map(
    lambda drawn: [draw_batch(*size, seed=drawn[1] + 10 * i) for i, size in enumerate(drawn[0])]
)


def assert_exact(graph_steps, graph_batches, losses=loss_fn, power=2, **options):
    torch.manual_seed(0)  # a Case draws, and a graph must be the same when it is tried again
    case = Case(Graph(graph_steps), graph_batches, losses, set())
    before = state_of(case.model)
    fisher = score(case, power=power, **options)
    limit = options.get("num_samples")
    exact = truth(case, power=power, limit=limit)
    plain = truth(case, torch.float32, power=power, limit=limit)
    assert_as_exact_as_a_loop(fisher, exact, plain, power)
    assert_same_state(before, state_of(case.model))
    return fisher


@fixed(100)
@given(st.lists(steps(), min_size=1, max_size=5), batches, st.sampled_from([2, 2, 1]))
def test_chains_of_anything(graph_steps, graph_batches, power):
    assert_exact(graph_steps, graph_batches, power=power)


@fixed(120)
@given(st.data(), batches)
def test_one_weight_in_several_orders(data, graph_batches):
    """Uses of a sample are summed before the square, whatever the order of each one's rows."""
    op = data.draw(st.sampled_from(sorted(OPS)))
    orders = data.draw(st.lists(st.sampled_from(orders_of(op)), min_size=2, max_size=3))
    assert_exact([Step(op, order, residual=True) for order in orders], graph_batches)


@fixed(60)
@given(st.lists(steps(), min_size=1, max_size=3), batches, st.data())
def test_samples_without_a_gradient_and_batches_cut_short(graph_steps, graph_batches, data):
    total = sum(len(batch[0]) for batch in graph_batches)
    limit = data.draw(st.integers(1, total))
    # A step before them all: losses must depend on a parameter.
    assert_exact([Step("linear"), *graph_steps], graph_batches, loss_of_some, num_samples=limit)


ROWS = ["linear", "matmul transposed", "layer norm", "rms norm", "shift", "gate", "embedding"]
REGULAR = ["plain", "time first", "flat", "flat, time first", "windows", "grid", "step by step"]


@pytest.mark.parametrize("order", REGULAR)
@pytest.mark.parametrize("op", ROWS)
def test_regular_rows_need_no_fallback(op, order):
    steps = [Step("linear"), Step(op, order, slot=1), Step("linear", slot=2)]
    fisher = assert_exact(steps, [draw_batch(3, 4, 0), draw_batch(2, 2, 1), draw_batch(2, 4, 2)])
    assert not fisher.fallback
