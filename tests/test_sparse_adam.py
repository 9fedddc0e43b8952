"""ff.AdamW against torch.optim.AdamW on dense gradients times the mask, bit for bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from stepping import (
    TORCH_HAS_FMA,
    CorrectSqrt,
    Weights,
    assert_same_history,
    gradients_over_time,
    mask_of,
    random_tensors,
    same_bits,
    snapshot_of_ours,
    some_indices,
    steps_of_ours,
    steps_of_torch,
    tune,
)
from torch import Tensor, nn

import fishfast as ff

BACKENDS = ["cpu", "torch"]
CPU_CHUNK = 16384  # csrc/cpu_step.h
TORCH_ADAMW = functools.partial(torch.optim.AdamW, foreach=False)


def float64_history(
    weights: list[Tensor], indices: list[Tensor], series: list[list[Tensor]], **options: Any
) -> list[dict[str, Tensor]]:
    """Return the oracle's weights and moments after each step, in the dense shapes."""
    history: list[dict[str, Tensor]] = [{} for _ in series]
    for position, (weight, found) in enumerate(zip(weights, indices, strict=True)):
        start = weight.flatten().double()
        dense = [(start.clone(), torch.zeros_like(start), torch.zeros_like(start)) for _ in series]
        gradients = torch.stack([step[position].flatten().double() for step in series])
        for index in found.tolist():
            path = oracle.adamw_trajectory(
                start[index].item(), gradients[:, index].tolist(), **options
            )
            for tensors, values in zip(dense, path, strict=True):
                for tensor, value in zip(tensors, values, strict=True):
                    tensor[index] = value
        for snapshot, tensors in zip(history, dense, strict=True):
            names = (f"w{position}", f"w{position}.exp_avg", f"w{position}.exp_avg_sq")
            for name, tensor in zip(names, tensors, strict=True):
                snapshot[name] = tensor.view(weight.shape)
    return history


def compare(
    weights: list[Tensor],
    indices: list[Tensor],
    series: list[list[Tensor]],
    backend: str,
    **options: Any,
) -> None:
    tuned = tune(weights, indices)
    optimizer = ff.AdamW(tuned.parameters(), backend=backend, **options)
    with CorrectSqrt():
        ours = steps_of_ours(tuned, optimizer, series)
    options.setdefault("weight_decay", 0.0)
    theirs = steps_of_torch(
        weights, indices, series, lambda parameters: TORCH_ADAMW(parameters, **options)
    )
    options["lr"] = float(options.get("lr", 1e-3))
    exact = None if TORCH_HAS_FMA else float64_history(weights, indices, series, **options)
    assert_same_history(ours, theirs, exact)


# --- the oracle of DESIGN.md ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "betas": (0.5, 0.9)},
        {"betas": (0.3, 0.5), "eps": 1e-3},
        {"betas": (0.0, 0.0)},
        {"lr": torch.tensor(0.02), "betas": (0.8, 0.95)},
        {"maximize": True},
        {"lr": 0.0},
        {"eps": 0.0},
    ],
    ids=["defaults", "large lr", "far lerp", "no memory", "tensor lr", "maximize", "lr 0", "eps 0"],
)
def test_equals_torch_bit_for_bit(options: dict[str, Any], backend: str) -> None:
    weights = random_tensors((37, 11), (5, 3, 2, 2), (53,))
    indices = [some_indices(w.numel(), seed=i) for i, w in enumerate(weights)]
    series = gradients_over_time(weights, steps=6)
    if options.get("eps") == 0.0:  # torch makes 0 / 0 of a weight that never had a gradient
        series = [[torch.where(g == 0, 1.0, g) for g in step] for step in series]
        indices = [torch.arange(w.numel()) for w in weights]
    compare(weights, indices, series, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["lr number", "lr tensor"])
def test_full_mask_equals_torch_with_weight_decay(
    lr: float | Tensor, weight_decay: float, backend: str
) -> None:
    weights = random_tensors((31, 7), (64,))
    indices = [torch.arange(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=5)
    compare(weights, indices, series, backend, lr=lr, weight_decay=weight_decay)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "numel", [1, 2, 31, 32, 33, 97, 1009, CPU_CHUNK, CPU_CHUNK + 1, 5 * CPU_CHUNK]
)
def test_sizes(numel: int, backend: str) -> None:
    weights = random_tensors(numel)
    series = gradients_over_time(weights, steps=2)
    compare(weights, [torch.arange(numel)], series, backend, lr=0.01)


def test_is_as_near_to_float64_as_torch() -> None:
    weights = random_tensors((40, 5))
    indices = [some_indices(200)]
    series = gradients_over_time(weights, steps=10)
    options = {"lr": 0.01, "betas": (0.8, 0.95)}
    tuned = tune(weights, indices)
    ours = steps_of_ours(tuned, ff.AdamW(tuned.parameters(), **options), series)[-1]
    make = functools.partial(TORCH_ADAMW, weight_decay=0.0, **options)
    theirs = steps_of_torch(weights, indices, series, make)[-1]
    exact = float64_history(weights, indices, series, **options)[-1]
    for key, truth in exact.items():
        error = (ours[key].double() - truth).abs().max()
        assert error <= 2 * (theirs[key].double() - truth).abs().max(), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_param_groups_have_their_own_options(backend: str) -> None:
    weights = random_tensors((9, 5), (17,), (4, 4))
    indices = [torch.arange(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=4)
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.8, 0.9)},
        {"weight_decay": 0.3, "eps": 1e-4},
        {"maximize": True, "lr": torch.tensor(0.02)},
    ]

    def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [p], **o} for p, o in zip(parameters, options, strict=True)]

    tuned = tune(weights, indices)
    optimizer = ff.AdamW(groups(list(tuned.parameters())), backend=backend)
    with CorrectSqrt():
        ours = steps_of_ours(tuned, optimizer, series)
    theirs = steps_of_torch(
        weights, indices, series, lambda p: TORCH_ADAMW(groups(p), weight_decay=0.0)
    )
    if not TORCH_HAS_FMA:
        pytest.skip("torch has no fused multiply-add here; the same in float64 is tested above")
    assert_same_history(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_without_a_gradient_in_some_steps(backend: str) -> None:
    weights = random_tensors((9, 5), (17,))
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=5)
    series[0][1] = series[2][0] = series[3][1] = None  # type: ignore[call-overload]
    tuned = tune(weights, indices)
    with CorrectSqrt():
        optimizer = ff.AdamW(tuned.parameters(), lr=0.1, backend=backend)
        ours = steps_of_ours(tuned, optimizer, series)
    make = functools.partial(TORCH_ADAMW, lr=0.1, weight_decay=0.0)
    theirs = steps_of_torch(weights, indices, series, make)
    assert [s.get("w1.step") for s in ours] == [None, 1, 2, 2, 3]
    if TORCH_HAS_FMA:
        assert_same_history(ours, theirs)


# --- layouts ---


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "dims swapped": lambda w: w.transpose(1, 3).contiguous().transpose(1, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_of_the_weight(layout: str, backend: str) -> None:
    weights = [LAYOUTS[layout](w) for w in random_tensors((6, 5, 3, 4))]
    indices = [some_indices(360)]
    series = gradients_over_time(weights, steps=3)
    compare(weights, indices, series, backend, lr=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_that_is_a_window_of_a_larger_tensor(backend: str) -> None:
    # Rows of 5 in a storage with rows of 8, starting at element 3: what lies between stays.
    storage = torch.randn(7, 8)
    before = storage.clone()
    model = nn.Module()
    model.weight = nn.Parameter(storage[:, 3:])
    tuned = ff.train_only(model, mask_of(model, {"weight": some_indices(35, 0.5)}))
    plain = tune([before[:, 3:].contiguous()], [tuned.mask["weight"]])
    series = gradients_over_time([before[:, 3:]], steps=3)
    steps_of_ours(tuned, ff.AdamW(tuned.parameters(), backend=backend), series)
    expected = steps_of_ours(plain, ff.AdamW(plain.parameters(), backend=backend), series)
    assert same_bits(storage[:, 3:], expected[-1]["w0"])
    assert same_bits(storage[:, :3], before[:, :3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_changed_between_steps(backend: str) -> None:
    weights = random_tensors((6, 5, 3, 4))
    indices = [some_indices(360)]
    series = gradients_over_time(weights, steps=4)
    expected_tuning, tuned = tune(weights, indices), tune(weights, indices)
    expected = steps_of_ours(
        expected_tuning, ff.AdamW(expected_tuning.parameters(), backend=backend), series
    )
    optimizer = ff.AdamW(tuned.parameters(), backend=backend)
    weight = tuned.model._parameters["w0"]
    for position, layout in enumerate(
        ["channels_last", "transposed", "contiguous", "dims swapped"]
    ):
        weight.data = LAYOUTS[layout](weight.data.contiguous())
        ours = steps_of_ours(tuned, optimizer, series[position : position + 1])
        assert_same_history(ours, expected[position : position + 1])


# --- saving and loading mid-run ---


def as_torch(tuned: ff.SparseTuning) -> torch.optim.Optimizer:
    optimizer = TORCH_ADAMW(tuned.parameters(), lr=0.1, weight_decay=0.0)
    tuned.attach(optimizer)
    return optimizer


def as_ours(tuned: ff.SparseTuning) -> torch.optim.Optimizer:
    return ff.AdamW(tuned.parameters(), lr=0.1)


@pytest.mark.skipif(not TORCH_HAS_FMA, reason="torch has no fused multiply-add here")
@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        (as_ours, as_ours, torch.float32),
        (as_torch, as_ours, torch.float32),
        (as_ours, as_torch, torch.float32),
        (as_ours, as_ours, torch.bfloat16),
        (as_ours, as_torch, torch.bfloat16),  # not from torch: its state has no masters
    ],
    ids=["ours to ours", "torch to ours", "ours to torch", "bf16", "bf16 to torch"],
)
def test_state_reloaded_mid_run(
    first: Callable[..., Any], second: Callable[..., Any], dtype: torch.dtype, tmp_path: Any
) -> None:
    weights = [w.to(dtype) for w in random_tensors((9, 5), (17,))]
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=7)
    uninterrupted, before, after = (tune(weights, indices) for _ in range(3))
    with CorrectSqrt():
        expected = steps_of_ours(uninterrupted, as_ours(uninterrupted), series)
        optimizer = first(before)
        steps_of_ours(before, optimizer, series[:3])
        state = {"model": before.model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / "checkpoint.pt")
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        after.model.load_state_dict(state["model"])
        resumed = second(after)
        if second is as_torch and dtype != torch.float32:  # our masters are what torch lacks
            ff.AdamW(after.parameters()).load_state_dict(state["optimizer"])
        resumed.load_state_dict(state["optimizer"])
        ours = steps_of_ours(after, resumed, series[3:])
    for snapshot in ours:
        snapshot.pop("w0.master", None)
        snapshot.pop("w1.master", None)
    assert_same_history(ours, expected[3:])


def test_resuming_restores_masters_of_bf16_weights() -> None:
    # Steps far below bf16's resolution: only the masters remember them.
    weights = [torch.ones(8, dtype=torch.bfloat16)]
    series = [[torch.ones(8)] for _ in range(40)]
    straight, before, after = (tune(weights, [torch.arange(8)]) for _ in range(3))
    options = {"lr": 1e-4}
    expected = steps_of_ours(straight, ff.AdamW(straight.parameters(), **options), series)
    optimizer = ff.AdamW(before.parameters(), **options)
    steps_of_ours(before, optimizer, series[:10])
    assert same_bits(before.model.w0, weights[0])  # nothing to be seen in bf16 yet
    after.model.load_state_dict(before.model.state_dict())
    resumed = ff.AdamW(after.parameters(), **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps_of_ours(after, resumed, series[10:])
    assert not same_bits(after.model.w0, weights[0])
    assert same_bits(after.model.w0, straight.model.w0)
    assert same_bits(next(after.parameters()), next(straight.parameters()))
    assert expected


def test_masters_of_other_weights_are_not_taken_over() -> None:
    # The optimizer is resumed, the model is not: its weights count.
    weights = [w.bfloat16() for w in random_tensors((9, 5))]
    trained, fresh = (tune(weights, [torch.arange(45)]) for _ in range(2))
    optimizer = ff.AdamW(trained.parameters(), lr=0.5)
    steps_of_ours(trained, optimizer, gradients_over_time(weights, steps=3))
    resumed = ff.AdamW(fresh.parameters(), lr=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.param_groups[0]["lr"] = 0.0
    steps_of_ours(fresh, resumed, [[torch.zeros(9, 5)]])
    assert same_bits(fresh.model.w0, weights[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_before_the_first_step_loads(dtype: torch.dtype) -> None:
    weights = [w.to(dtype) for w in random_tensors((9, 5))]
    indices = [some_indices(45)]
    series = gradients_over_time(weights, steps=2)
    tuned, other = tune(weights, indices), tune(weights, indices)
    for second in (as_ours, as_torch):
        optimizer = second(other)
        optimizer.load_state_dict(as_ours(tuned).state_dict())
        assert len(steps_of_ours(other, optimizer, series)) == 2


def test_lowered_precision_state_is_loaded_as_fp32() -> None:
    # load_state_dict casts state to the parameter's dtype: fp32, for the masters are.
    weights = [w.bfloat16() for w in random_tensors((9, 5))]
    tuned = tune(weights, [some_indices(45)])
    optimizer = ff.AdamW(tuned.parameters())
    steps_of_ours(tuned, optimizer, gradients_over_time(weights, steps=2))
    other = tune(weights, [some_indices(45)])
    loaded = ff.AdamW(other.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    for before, after in zip(tuned.parameters(), other.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(optimizer.state[before][key], loaded.state[after][key])


def test_state_of_another_mask_is_refused() -> None:
    weights = random_tensors((9, 5))
    small, large = tune(weights, [torch.arange(3)]), tune(weights, [torch.arange(30)])
    optimizer = ff.AdamW(small.parameters())
    steps_of_ours(small, optimizer, gradients_over_time(weights, steps=1))
    target = ff.AdamW(large.parameters())
    with pytest.raises(ValueError, match=r"state_dict must fit the parameters; .*exp_avg.* \(3,\)"):
        target.load_state_dict(optimizer.state_dict())
    assert not target.state


def test_masters_of_another_mask_are_refused() -> None:
    weights = [w.bfloat16() for w in random_tensors((9, 5))]
    one, many = tune(weights, [torch.arange(1)]), tune(weights, [torch.arange(30)])
    optimizer = ff.AdamW(one.parameters())
    steps_of_ours(one, optimizer, gradients_over_time(weights, steps=1))
    state = optimizer.state_dict()
    state["state"][0] = {"master": state["state"][0]["master"]}  # it would broadcast
    before = next(many.parameters()).detach().clone()
    with pytest.raises(ValueError, match="state_dict must fit the parameters; .*master"):
        ff.AdamW(many.parameters()).load_state_dict(state)
    assert same_bits(next(many.parameters()), before)


def test_amsgrad_state_is_refused() -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    state = torch.optim.AdamW(tuned.parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad is not supported; got a state"):
        ff.AdamW(tuned.parameters()).load_state_dict(state)


# --- weights of 16 bits ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_follow_fp32_masters(dtype: torch.dtype, backend: str) -> None:
    weights = [w.to(dtype) for w in random_tensors((33, 7), (101,))]
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=6)
    low = tune(weights, indices)
    full = tune([w.float() for w in weights], indices)
    options: dict[str, Any] = {"lr": 1e-3, "backend": backend}
    low_optimizer = ff.AdamW(low.parameters(), **options)
    full_optimizer = ff.AdamW(full.parameters(), **options)
    for gradients in series:
        steps_of_ours(low, low_optimizer, [gradients])
        steps_of_ours(full, full_optimizer, [gradients])
        for (name, ours), theirs in zip(low.named_parameters(), full.parameters(), strict=True):
            assert ours.dtype == torch.float32
            assert same_bits(ours, theirs)  # the masters are exactly the fp32 run
            name = name.removesuffix("_values")
            weight = low.model._parameters[name].detach().flatten()
            found = low.mask[name].long()
            assert same_bits(weight[found], ours.detach().to(dtype))
            untouched = torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, found, False)
            original = weights[int(name[1:])].flatten()
            assert same_bits(weight[untouched], original[untouched])


def scatter(masters: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Let a step with lr 0 write chosen masters into weights of a dtype."""
    tuned = tune([torch.zeros(masters.numel(), dtype=dtype)], [torch.arange(masters.numel())])
    (values,) = tuned.parameters()
    values.data.copy_(masters)
    steps_of_ours(
        tuned, ff.AdamW(tuned.parameters(), lr=0.0, backend=backend), [[torch.zeros_like(masters)]]
    )
    assert same_bits(values, masters) or masters.isnan().any()
    return tuned.model.w0.detach()


def assert_casts_agree(ours: Tensor, expected: Tensor) -> None:
    # torch itself has two bit patterns for a bf16 NaN, in its vector and its scalar loop.
    assert torch.equal(ours.isnan(), expected.isnan())
    assert same_bits(ours[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestConversions:
    def test_every_16_bit_pattern_comes_back(self, dtype: torch.dtype, backend: str) -> None:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
        assert_casts_agree(scatter(patterns.float(), dtype, backend), patterns)

    def test_random_fp32_bit_patterns(self, dtype: torch.dtype, backend: str) -> None:
        bits = torch.randint(-(2**31), 2**31, (400_000,)).int()
        assert_casts_agree(
            scatter(bits.view(torch.float32), dtype, backend), bits.view(torch.float32).to(dtype)
        )

    def test_halfway_cases(self, dtype: torch.dtype, backend: str) -> None:
        # Every value midway between two neighbours, and one fp32 step to either side of it.
        patterns = torch.arange(0, 2**15, dtype=torch.int32).short().view(dtype).double()
        patterns = patterns[patterns.isfinite()]
        middle = ((patterns[1:] + patterns[:-1]) / 2).float()
        assert torch.equal(middle.double(), (patterns[1:] + patterns[:-1]) / 2)
        around = torch.cat([
            middle,
            torch.nextafter(middle, torch.tensor(torch.inf)),
            torch.nextafter(middle, torch.tensor(0.0)),
        ])  # fmt: skip
        largest = torch.tensor(torch.finfo(dtype).max)
        edge = [
            torch.nextafter(largest, torch.tensor(torch.inf)),
            largest * 1.0009,
            largest * 1.001,
        ]
        masters = torch.cat([around, -around, torch.stack(edge)])
        assert_casts_agree(scatter(masters, dtype, backend), masters.to(dtype))


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be at least 0; got -1\.0"),
        ({"lr": float("nan")}, "lr must be at least 0; got nan"),
        ({"lr": torch.tensor(-0.5)}, "lr must be at least 0; got"),
        ({"eps": -1e-8}, "eps must be at least 0; got -1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay must be at least 0; got -0\.1"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\); got \(1\.0, 0\.9\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be in \[0, 1\); got"),
        ({"betas": (0.9, float("nan"))}, r"betas must be in \[0, 1\); got"),
        ({"backend": "fast"}, "backend must be 'auto' or one of .*; got 'fast'"),
        ({"backend": "cuda"}, "backend must be 'auto' or one of .* on cpu; got 'cuda'"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_bad_option_is_refused(options: dict[str, Any], message: str) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    with pytest.raises(ValueError, match=message):
        ff.AdamW(tuned.parameters(), **options)


def test_weight_decay_defaults_to_zero() -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    assert ff.AdamW(tuned.parameters()).defaults["weight_decay"] == 0


def test_state_names_are_those_of_torch() -> None:
    weights = random_tensors((9, 5))
    tuned = tune(weights, [some_indices(45)])
    optimizer = ff.AdamW(tuned.parameters())
    steps_of_ours(tuned, optimizer, gradients_over_time(weights, steps=1))
    model = Weights(*weights)
    reference = TORCH_ADAMW(model.parameters())
    model.w0.grad = torch.ones(9, 5)
    reference.step()
    assert optimizer.state_dict()["state"][0].keys() == reference.state_dict()["state"][0].keys()
    assert set(snapshot_of_ours(tuned, optimizer)) == {
        "w0", "w0.step", "w0.exp_avg", "w0.exp_avg_sq",
    }  # fmt: skip
