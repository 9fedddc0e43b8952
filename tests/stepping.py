"""Runs fishfast's and torch's optimizers in lockstep on given gradients; compares bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fishfast as ff

# lerp, addcmul and add with a factor are fused multiply-adds in torch's AVX2 and AVX-512 only.
TORCH_HAS_FMA = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

BACKENDS = ["cpu", "torch"]
CPU_CHUNK = 16384  # csrc/cpu_step.h
TORCH_ADAMW = functools.partial(torch.optim.AdamW, foreach=False)
TORCH_ADAM = functools.partial(torch.optim.Adam, foreach=False)
TORCH_SGD = functools.partial(torch.optim.SGD, foreach=False)


class CorrectSqrt(TorchFunctionMode):
    """Makes Tensor.sqrt correctly rounded in fp32.

    torch takes it from MKL, which on AMD is one unit in the last place off in a fifth of all
    values and on Intel is right, so torch's optimizer is a bit-exact oracle only with this. The
    float64 root has enough bits (53 >= 2 * 24 + 2) for its rounding to fp32 to be the right one.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.sqrt and args[0].dtype == torch.float32:
            return args[0].double().sqrt().float()
        return func(*args, **(kwargs or {}))


class Weights(nn.Module):
    """Nothing but parameters, called w0, w1, ..., in the memory layout of the given tensors."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        for position, tensor in enumerate(tensors):
            copy = torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor)
            self.register_parameter(f"w{position}", nn.Parameter(copy))


def mask_of(model: nn.Module, indices: dict[str, Tensor]) -> ff.SparseMask:
    """Return the mask with these indices; parameters that are not named have none."""
    return ff.SparseMask(indices, {name: tuple(p.shape) for name, p in model.named_parameters()})


def some_indices(numel: int, density: float = 0.3, seed: int = 0) -> Tensor:
    """Return ascending random indices, at least one."""
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, int(density * numel))].sort().values.int()


def random_tensors(*shapes: tuple[int, ...] | int, seed: int = 0) -> list[Tensor]:
    """Return normal fp32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gradients_over_time(weights: list[Tensor], steps: int, seed: int = 1) -> list[list[Tensor]]:
    """Return gradients of very different sizes, some of them zero, for each step."""
    generator = torch.Generator().manual_seed(seed)
    series = []
    for _ in range(steps):
        step = []
        for weight in weights:
            grad = torch.randn(weight.shape, generator=generator)
            exponents = torch.randint(-20, 4, weight.shape, generator=generator)
            zero = torch.rand(weight.shape, generator=generator) < 0.05
            step.append(torch.where(zero, 0.0, grad * 2.0**exponents))
        series.append(step)
    return series


def tune(weights: list[Tensor], indices: list[Tensor]) -> ff.SparseTuning:
    """Return the handle on a model that holds these weights and trains these entries."""
    model = Weights(*weights)
    return ff.train_only(
        model, mask_of(model, {f"w{position}": found for position, found in enumerate(indices)})
    )


def set_gradients(tuned: ff.SparseTuning, gradients: list[Tensor | None]) -> None:
    """Hand each compact parameter its part of a dense gradient."""
    for (name, values), grad in zip(tuned.named_parameters(), gradients, strict=True):
        found = tuned.mask[name.removesuffix("_values")]
        values.grad = None if grad is None else grad.flatten()[found.long()]


def steps_of_ours(
    tuned: ff.SparseTuning, optimizer: torch.optim.Optimizer, series: list[list[Tensor | None]]
) -> list[dict[str, Tensor]]:
    """Step through the gradients; return weights and dense state after each step."""
    history = []
    for gradients in series:
        set_gradients(tuned, gradients)
        optimizer.step()
        history.append(snapshot_of_ours(tuned, optimizer))
    return history


def snapshot_of_ours(tuned: ff.SparseTuning, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the weights and the optimizer's state, spread out over the dense shape."""
    found = {}
    for name, values in tuned.named_parameters():
        name = name.removesuffix("_values")
        weight = tuned.model._parameters[name]
        found[name] = weight.detach().clone()
        for key, state in optimizer.state[values].items():
            if state is None or key == "master":  # the values themselves
                continue
            if state.dim() == 0:
                found[f"{name}.{key}"] = state.clone()
            else:
                dense = torch.zeros(weight.numel())
                dense[tuned.mask[name].long()] = state
                found[f"{name}.{key}"] = dense.view(weight.shape)
    return found


def steps_of_torch(
    weights: list[Tensor],
    indices: list[Tensor],
    series: list[list[Tensor | None]],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> list[dict[str, Tensor]]:
    """Step torch's optimizer over the dense weights with gradients times the mask."""
    model = Weights(*weights)
    parameters = list(model.parameters())
    optimizer = make(parameters)
    history = []
    with CorrectSqrt():
        for gradients in series:
            for parameter, found, grad in zip(parameters, indices, gradients, strict=True):
                if grad is None:
                    parameter.grad = None
                    continue
                masked = torch.zeros(grad.numel())
                masked[found.long()] = grad.flatten()[found.long()]
                parameter.grad = torch.empty_like(parameter).copy_(masked.view(grad.shape))
            optimizer.step()
            snapshot = {}
            for position, parameter in enumerate(parameters):
                snapshot[f"w{position}"] = parameter.detach().clone()
                outside = torch.ones(parameter.numel(), dtype=torch.bool)
                outside[indices[position].long()] = False
                for key, state in optimizer.state[parameter].items():
                    if state is None:
                        continue
                    snapshot[f"w{position}.{key}"] = state = state.clone()
                    if state.dim():  # maximize makes -0.0 of the zeros outside the mask
                        state[outside.view(state.shape)] += 0.0
            history.append(snapshot)
    return history


def oracle_history(
    trajectory: Callable[..., list[tuple[float, ...]]],
    suffixes: tuple[str, ...],
    weights: list[Tensor],
    indices: list[Tensor],
    series: list[list[Tensor]],
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Return what an oracle makes of the masked entries in each step, in the dense shapes.

    The oracle's first values are named w0, w1, ... and these suffixes, the first for the weight.
    """
    history: list[dict[str, Tensor]] = [{} for _ in series]
    options["lr"] = float(options["lr"])
    for position, (weight, found) in enumerate(zip(weights, indices, strict=True)):
        start = weight.flatten().double()
        dense = [[start.clone(), *(torch.zeros_like(start) for _ in suffixes[1:])] for _ in series]
        gradients = torch.stack([step[position].flatten().double() for step in series])
        for index in found.tolist():
            path = trajectory(start[index].item(), gradients[:, index].tolist(), **options)
            for tensors, values in zip(dense, path, strict=True):
                for tensor, value in zip(tensors, values, strict=False):
                    tensor[index] = value
        for snapshot, tensors in zip(history, dense, strict=True):
            for suffix, tensor in zip(suffixes, tensors, strict=True):
                snapshot[f"w{position}{suffix}"] = tensor.view(weight.shape)
    return history


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit (NaN equals itself, 0.0 is not -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.uint8}[a.element_size()]
    a, b = a.detach().contiguous().reshape(-1), b.detach().contiguous().reshape(-1)
    return torch.equal(a.view(kind), b.view(kind))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's state_dict, to compare with later."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Compare the model's state_dict with an earlier one: names, order and bits."""
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(state[name], tensor), name


def assert_same_history(
    ours: list[dict[str, Tensor]],
    theirs: list[dict[str, Tensor]],
    exact: list[dict[str, Tensor]] | None = None,
) -> None:
    """Compare weights and state at each step: bit for bit where torch's arithmetic is ours.

    Where torch has no fused multiply-add, our error against float64 (``exact``, which holds some
    of the entries) may be at most twice torch's, or one rounding of the largest value per step: of
    few values, torch may have all of them exactly right by luck.
    """
    assert len(ours) == len(theirs) > 0
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys(), f"step {step}"
        for key in mine:
            if TORCH_HAS_FMA or exact is None:
                assert same_bits(mine[key], other[key]), f"step {step}, {key}"
            elif key in exact[step]:
                truth = exact[step][key]
                error = (mine[key].double() - truth).abs().max()
                allowed = 2 * (other[key].double() - truth).abs().max()
                allowed = torch.maximum(allowed, (step + 1) * 2.0**-24 * truth.abs().max())
                assert error <= allowed, f"step {step}, {key}: {error} > {allowed}"
