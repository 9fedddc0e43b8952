"""``fishfast info``: what is installed, and what runs here."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate

import fishfast as ff
from fishfast.cli.common import JSON

__all__ = ["info"]

_ROADS = {
    "cpu": "cpu (compiled C++)",
    "cuda": "cuda (compiled kernels)",
    "triton": "triton",
    "torch": "torch",
}
_OPTIONAL = ("transformers", "datasets", "matplotlib", "scikit-learn")


@click.command(short_help="Say what is installed and what runs here.")
@JSON
def info(as_json: bool) -> None:
    """Say what is installed, what runs each operation, and why something is off."""
    facts = describe()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = [(name, text) for name, text in facts["versions"].items()]
    rows += [("GPU", name) for name in facts["gpus"]] or [("GPU", "none")]
    click.echo(tabulate(rows, tablefmt="plain", disable_numparse=True) + "\n")
    operations = [
        (name, _ROADS[on["cpu"]], _ROADS[on["cuda"]]) for name, on in facts["operations"].items()
    ]
    click.echo(tabulate(operations, headers=("operation", "on the CPU", "on a GPU")))
    if facts["unavailable"]:
        off = [(f"{name} is off:", why) for name, why in facts["unavailable"].items()]
        click.echo("\n" + tabulate(off, tablefmt="plain", disable_numparse=True))


def describe() -> dict[str, Any]:
    """Return the facts: versions, GPUs, operations, and what is unavailable."""
    built = ff.build_info()
    extension = built["extension"] or "none"
    versions = {
        "fishfast": f"{built['version']} in {Path(ff.__file__).parent}",
        "extension": extension,
        "compiler": built["compiler"] or "none",
        "nvcc": f"{built['nvcc']} for {built['cuda_archs']}" if built["nvcc"] else "none",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "torch's CUDA": torch.version.cuda or "none: a CPU build",
        "NVIDIA driver": _driver(),
        "triton": _version("triton"),
    }
    versions |= {name: _version(name) for name in _OPTIONAL}
    gpus = [
        f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {
        "versions": versions,
        "gpus": gpus,
        "operations": built["operations"],
        "unavailable": built["unavailable"],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "none"
    return first.partition(":")[2].strip() or "none"
