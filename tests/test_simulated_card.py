"""The simulated card refuses and counts what a card would; what our steps ask of one.

Run with ``pytest -m gpu --simulated-card``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_models import batches, losses, net

import fishfast as ff
from fishfast import _backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.version.cuda is not None or not torch.cuda.is_available(),
        reason="for the simulated card (make test-card)",
    ),
]


@pytest.fixture
def card(simulated_card: Any) -> Any:
    """The card, with nothing counted."""
    simulated_card.forget()
    return simulated_card


def _write_by_mask(x: torch.Tensor) -> None:
    x[x > 0] = torch.zeros_like(x[:1])


def test_operands_on_two_devices_are_refused() -> None:
    x = torch.ones(3, device="cuda:0")
    for other in (torch.ones(3), torch.ones(3, device="cuda:1")):
        with pytest.raises(RuntimeError, match="to be on the same device"):
            torch.add(x, other)
    assert torch.add(x, torch.tensor(1.0)).sum() == 6  # of no dimension, as on a card


@pytest.mark.parametrize(
    ("what", "ask"),
    [
        ("aten::_local_scalar_dense", lambda x: x.sum().item()),
        ("aten::nonzero", lambda x: x.nonzero()),
        ("copy to the host", lambda x: x.cpu()),
        ("aten::nonzero", lambda x: x[x > 0]),
        (
            "aten::_index_put_impl_ by a mask",
            lambda x: x.__setitem__(x > 0, torch.zeros_like(x[:1])),
        ),
        ("aten::equal", lambda x: torch.equal(x, x)),
    ],
    ids=["item", "nonzero", "cpu", "mask", "mask written", "equal"],
)
def test_what_waits_is_counted(card: Any, what: str, ask: Any) -> None:
    ask(torch.ones(3, device="cuda"))
    assert card.waits().get(what) == 1


def test_what_does_not_wait_is_not_counted(card: Any) -> None:
    x = torch.ones(3, 3, device="cuda")
    x[:, 0] = x @ x[0] + x.sum()
    x.clone().resize_(2, 2)
    torch.ones(3).to("cuda", non_blocking=True)
    assert not card.waits()
    assert card.operators()


def test_views_results_and_gradients_stay_on_their_device() -> None:
    x = torch.arange(6.0, device="cuda:1").view(2, 3).requires_grad_()
    y = x.t()[1:].contiguous().square()
    y.sum().backward()
    assert {t.device.index for t in (x, y, x.grad, y.to(torch.bfloat16))} == {1}  # type: ignore[union-attr]
    assert torch.equal(x.grad.cpu(), torch.tensor([[0.0, 2, 4], [0, 8, 10]]))  # type: ignore[union-attr]
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("make", [ff.AdamW, ff.Adam, ff.SGD])
def test_a_steady_step_is_one_launch_and_waits_for_nothing(make: Any, card: Any) -> None:
    model = net().cuda()
    optimizer = make(
        ff.train_only(model, ff.random_mask(model, density=0.1, seed=0)).parameters(), lr=0.1
    )
    extension = _backend.compiled()
    for step in range(4):
        losses(model, batches("cuda")[0]).mean().backward()
        card.forget()
        launches = extension.launches
        optimizer.step()
        if step:  # the first makes state
            assert extension.launches - launches == 1
            assert not card.waits()
            assert not card.operators()
        optimizer.zero_grad()


def test_forward_and_backward_of_a_tuned_model_wait_for_nothing(card: Any) -> None:
    model = net().cuda()
    ff.train_only(model, ff.random_mask(model, density=0.1, seed=0))
    for steady in (False, True):
        card.forget()
        losses(model, batches("cuda")[0]).mean().backward()
        assert not steady or not card.waits()


def test_a_mask_waits_at_most_six_times(card: Any) -> None:
    scores = {name: torch.rand_like(p) for name, p in net().cuda().named_parameters()}
    card.forget()
    ff.top_k_mask(scores, density=0.1, keep=["6"], exclude=["0"])
    assert sum(card.waits().values()) <= 6
