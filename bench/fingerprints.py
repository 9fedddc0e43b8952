"""The same seeded inputs on the CPU, the card and the simulated CUDA kernels: the same bits?

    python bench/fingerprints.py run cpu|cuda|simulated FILE.json
    python bench/fingerprints.py compare FILE.json...

A mask, and a step's weights, masters and state, have one bit pattern: a hash of it must agree
everywhere. Fisher scores are sums in another order on another device: on a card they are held
against the CPU's by their relative error, and two runs must give the same bits. "simulated" needs
g++ and runs csrc/*.cu on simulated threads (tests/simt).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fishfast as ff

__all__ = ["differences", "main"]

_TESTS = Path(__file__).resolve().parents[1] / "tests"
_DEVICES = ("cpu", "cuda", "simulated")
_FISHER_TOLERANCE = 1e-3  # relative, in the Frobenius norm; a wrong sum is off by far more

_OPTIMIZERS: dict[str, tuple[Callable[..., Any], torch.dtype, dict[str, Any]]] = {
    "AdamW bf16": (ff.AdamW, torch.bfloat16, {"weight_decay": 0.1}),
    "AdamW amsgrad fp32": (
        ff.AdamW, torch.float32, {"amsgrad": True, "betas": (0.9, 0.5)},
    ),
    "Adam fp16": (ff.Adam, torch.float16, {"weight_decay": 0.1}),
    "SGD fp32": (ff.SGD, torch.float32, {}),
    "SGD nesterov bf16": (
        ff.SGD, torch.bfloat16, {"momentum": 0.9, "nesterov": True},
    ),
}  # fmt: skip


def _hash(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def lognormal(n: int) -> Tensor:
        return torch.randn(n, generator=generator).mul_(2).exp_()

    return {
        "one": lognormal(1),
        "warp + 1": lognormal(33),
        "empty": lognormal(0),
        "tile + 1": lognormal(8193),
        "bf16": lognormal(20_011).bfloat16(),
        "ties": torch.randint(0, 3, (4099,), generator=generator).half(),
        "zeros": torch.zeros(777),
        "large": lognormal(50_021),
    }


def _masks(device: str) -> dict[str, str]:
    where, backend = ("cpu", "simulated") if device == "simulated" else (device, device)
    scores = {name: score.to(where) for name, score in _scores().items()}
    n = sum(score.numel() for score in scores.values())
    hashes = {}
    with _simulated_masks() if device == "simulated" else contextlib.nullcontext():
        for k in (1, n // 200, n // 2, n - 100):
            mask = ff.top_k_mask(scores, k=k, backend=backend)
            hashes[f"top_k_mask k={k}"] = _hash(mask[name] for name in scores)
    return hashes


def _steps(device: str) -> dict[str, str]:
    where = "cpu" if device == "simulated" else device
    with _simulated_steps() if device == "simulated" else contextlib.nullcontext():
        return {
            name: _hash(_train(make, dtype, where, device, options))
            for name, (make, dtype, options) in _OPTIMIZERS.items()
        }


def _train(
    make: Callable[..., Any], dtype: torch.dtype, device: str, backend: str,
    options: dict[str, Any],
) -> list[Tensor]:  # fmt: skip
    """Take four steps on random gradients, and return all that a step writes."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1031,), (64, 33, 3, 3), (2049, 7), (1,)]
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    model = nn.ParameterList(weights).to(device)
    tuned = ff.train_only(model, ff.random_mask(model, density=0.4, seed=0))
    optimizer = make(tuned.parameters(), lr=1e-2, backend=backend, **options)
    for _ in range(4):
        for parameter in tuned.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*model.parameters(), *tuned.parameters(), *filter(torch.is_tensor, states)]


@contextlib.contextmanager
def _simulated_masks() -> Iterator[None]:
    import pytest
    from simt.topk_mask_backend import SOURCES, SimulatedTopk, install

    with pytest.MonkeyPatch.context() as patch:
        install(patch, SimulatedTopk(_library(*SOURCES)))
        yield


@contextlib.contextmanager
def _simulated_steps() -> Iterator[None]:
    import pytest
    from simt.sparse_step_backend import SOURCES, install

    with pytest.MonkeyPatch.context() as patch:
        extension = install(patch, _library(*SOURCES))
        yield
        if not extension.launches:
            raise RuntimeError("the simulated kernels were not called")


@functools.cache
def _library(*sources: Path) -> Any:
    from simt.build import build
    from simt.library import SimtLibrary

    with tempfile.TemporaryDirectory() as folder:  # once loaded, it needs no file
        library = SimtLibrary(build(sources, Path(folder) / "kernels.so"))
    library.schedule(seed=0)
    return library


def _fisher_on_card() -> dict[str, dict[str, Any]]:
    """Hold the Triton kernels against the CPU, and a second run against the first."""
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions is not fp32
    reference = _fisher("cpu")
    first, second = _fisher("cuda"), _fisher("cuda")
    return {
        name: {
            "relative_error": float((first[name].cpu().double() - exact.double()).norm())
            / float(exact.double().norm()),
            "tolerance": _FISHER_TOLERANCE,
            "same_bits_twice": torch.equal(first[name], second[name]),
        }
        for name, exact in reference.items()
    }


class _Net(nn.Module):
    """A layer for each kernel of the Fisher: embedding, sums, convolution, rows, samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 48)
        self.norm = nn.LayerNorm(48)
        self.mix = nn.Linear(48, 72)
        self.conv = nn.Conv1d(72, 40, 3, padding=1)
        self.head = nn.Linear(40, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, 5] of tokens [B, T]."""
        hidden = F.gelu(self.mix(self.norm(self.embed(tokens))))
        return self.head(F.gelu(self.conv(hidden.mT)).mean(2))


def _fisher(device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = _Net().to(device)
    batches = [
        (torch.randint(0, 97, (6, 37)).to(device), torch.randint(0, 5, (6,)).to(device))
        for _ in range(2)
    ]

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return dict(ff.estimate_fisher(model, batches, loss_fn=losses))


def differences(runs: list[dict[str, Any]]) -> list[str]:
    """Return what does not agree, in words; the first run is what the others are held against.

    Args:
        runs: what ``run`` wrote, one per device.
    """
    expected, found = runs[0], []
    for run in runs:
        for name in expected["bits"].keys() | run["bits"].keys():
            hashes = [r["bits"].get(name, "missing") for r in (expected, run)]
            if hashes[0] != hashes[1]:
                found.append(
                    f"{name}: {run['device']} {hashes[1][:16]}, {expected['device']} "
                    f"{hashes[0][:16]}"
                )
        for name, close in run.get("fisher", {}).items():
            if not close["relative_error"] <= close["tolerance"]:  # NaN too
                found.append(
                    f"Fisher of {name}: relative error {close['relative_error']:.2e} on "
                    f"{run['device']}, allowed {close['tolerance']:.0e}"
                )
            if not close["same_bits_twice"]:
                found.append(f"Fisher of {name}: two runs on {run['device']} differ")
    return sorted(found)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare the bits that devices compute from the same inputs."""


@main.command("run")
@click.argument("device", type=click.Choice(_DEVICES))
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--only", type=click.Choice(["bits", "fisher"]), help="The compiled part, or Triton's."
)
def _run(device: str, file: Path, only: str | None) -> None:
    """Compute everything on DEVICE and write its fingerprints to FILE."""
    sys.path.insert(0, str(_TESTS))
    result: dict[str, Any] = {"device": device, "bits": {}}
    if only != "fisher":
        result["bits"] = _masks(device) | _steps(device)
    if device == "cuda" and only != "bits":
        result["fisher"] = _fisher_on_card()
    file.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(
        f"{device}: {len(result['bits'])} bit patterns, {len(result.get('fisher', ()))} scores"
    )


@main.command("compare")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def _compare(files: tuple[Path, ...]) -> None:
    """Fail if what FILES hold differs."""
    runs = [json.loads(file.read_text()) for file in files]
    found = differences(runs)
    for line in found:
        click.echo(line, err=True)
    if found:
        raise SystemExit(1)
    devices = ", ".join(run["device"] for run in runs)
    click.echo(f"{devices}: the same {len(runs[0]['bits'])} bit patterns")


if __name__ == "__main__":
    main()
