"""Steps of both optimizers are deterministic and leave alone what is not in the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparse_optimizer_makers import BACKENDS, MAKERS, Make
from stepping import (
    TORCH_HAS_FMA,
    CorrectSqrt,
    assert_state,
    gradients_over_time,
    mask_of,
    random_tensors,
    same_bits,
    some_indices,
    state_of,
    steps_of_ours,
    tune,
)
from torch import nn

import fishfast as ff


@pytest.mark.skipif(not TORCH_HAS_FMA, reason="torch has no fused multiply-add here")
@MAKERS
def test_backends_agree_bit_for_bit(make: Make) -> None:
    weights = random_tensors((301, 7), (4, 3, 2, 2))
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=5)
    compiled, plain = tune(weights, indices), tune(weights, indices)
    with CorrectSqrt():
        ours = steps_of_ours(compiled, make(compiled.parameters(), backend="cpu"), series)
        theirs = steps_of_ours(plain, make(plain.parameters(), backend="torch"), series)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(same_bits(mine[key], other[key]) for key in mine)


@MAKERS
def test_threads_do_not_change_the_bits(make: Make) -> None:
    # 20 pieces of csrc/cpu_step.h, and five threads are really started.
    weights = random_tensors(17 * 16384 + 5, 3 * 16384)
    indices = [torch.arange(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=2)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            tuned = tune(weights, indices)
            optimizer = make(tuned.parameters(), backend="cpu")
            results.append(steps_of_ours(tuned, optimizer, series)[-1])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(results[0][key], other[key]) for key in results[0])


@MAKERS
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untouched_weights_stay_bit_identical(
    make: Make, backend: str, dtype: torch.dtype, tmp_path: Any
) -> None:
    weight = torch.randn(40, 9).to(dtype)
    # Values that any arithmetic would change: NaN with a payload, -0.0, subnormal, infinite.
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    special = torch.tensor([-1, -2, 1, 3], dtype=bits).view(dtype)
    weight.view(-1)[:6] = torch.cat([special, torch.tensor([-0.0, torch.inf]).to(dtype)])
    found = torch.arange(10, 360, 3)
    outside = torch.ones(360, dtype=torch.bool).index_fill(0, found, False)

    def assert_untouched(model: nn.Module) -> None:
        assert same_bits(model.state_dict()["w0"].view(-1)[outside], weight.view(-1)[outside])

    tuned = tune([weight], [found])
    # Hashing and saving refuse no NaN outside the mask: it is the base's own.
    optimizer = make(tuned.parameters(), weight_decay=0.3, backend=backend)
    for round_ in range(3):
        steps_of_ours(tuned, optimizer, gradients_over_time([weight], steps=10, seed=round_))
        assert_untouched(tuned.model)
        tuned.model.load_state_dict(tuned.model.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
        ff.save_delta(tuned, tmp_path / "delta.safetensors")
        assert_untouched(tuned.model)
    trained = tuned.model.state_dict()["w0"].clone()
    assert not same_bits(trained.view(-1)[found], weight.view(-1)[found])
    other = tune([weight], [found]).release()
    delta = ff.load_delta(tmp_path / "delta.safetensors")
    for _ in range(3):
        delta.apply_(other)
        assert_untouched(other)
        delta.revert_(other)
        assert same_bits(other.state_dict()["w0"], weight)


@MAKERS
@BACKENDS
def test_mask_whose_indices_are_strided(make: Make, backend: str) -> None:
    weights = random_tensors((20, 5))
    all_indices = torch.arange(100)
    strided, plain = tune(weights, [all_indices[::3]]), tune(weights, [all_indices[::3].clone()])
    series = gradients_over_time(weights, steps=3)
    steps_of_ours(strided, make(strided.parameters(), backend=backend), series)
    steps_of_ours(plain, make(plain.parameters(), backend=backend), series)
    assert_state(strided.model, state_of(plain.model))


@MAKERS
@BACKENDS
def test_weight_decay_touches_masked_entries_only(make: Make, backend: str) -> None:
    weights = random_tensors((20, 5))
    found = some_indices(100)
    tuned = tune(weights, [found])
    optimizer = make(tuned.parameters(), weight_decay=0.5, backend=backend)
    steps_of_ours(tuned, optimizer, [[torch.zeros(20, 5)]] * 20)
    after, before = tuned.model.w0.detach().flatten(), weights[0].flatten()
    outside = torch.ones(100, dtype=torch.bool).index_fill(0, found.long(), False)
    assert same_bits(after[outside], before[outside])
    assert (after[found.long()].abs() < before[found.long()].abs()).all()


@pytest.mark.large
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_weight_of_more_than_2_to_the_31_elements(backend: str, tmp_path: Any) -> None:
    numel = 2**31 + 11
    found = torch.tensor([0, 5, 2**31 - 1, 2**31, numel - 1])
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16), requires_grad=False)
    tuned = ff.train_only(model, mask_of(model, {"weight": found}))
    assert tuned.mask["weight"].dtype == torch.int64
    (values,) = tuned.parameters()
    values.grad = -torch.arange(1.0, 6.0)
    ff.SGD(tuned.parameters(), lr=1.0, backend=backend).step()
    ff.save_delta(tuned, tmp_path / "delta")
    weight = tuned.release().weight.detach()
    assert torch.equal(weight[found].float(), torch.arange(1.0, 6.0))
    assert sum(int(part.count_nonzero()) for part in weight.split(2**28)) == 5
    weight.zero_()
    ff.load_delta(tmp_path / "delta").apply_(model)
    assert torch.equal(weight[found].float(), torch.arange(1.0, 6.0))
