"""Puts the machine into pytest-benchmark's JSON and in front of its output."""

from __future__ import annotations

from typing import Any

import torch
from harness import full_size, machine


def pytest_configure() -> None:
    """Run toy sizes in one thread: waking more costs more than the work."""
    if not full_size():
        torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Head the figures with the machine that they belong to."""
    info = machine()
    note = "REHEARSAL at toy size: " if info["rehearsal"] else ""
    return (
        f"{note}{info['device']}, driver {info['driver']}, torch {info['torch']}, "
        f"triton {info['triton']}, commit {info['commit']}"
    )


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Add the machine that `harness.machine` describes."""
    output_json["machine"] = machine()
