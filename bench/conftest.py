"""Puts the machine into pytest-benchmark's JSON and in front of its output."""

from __future__ import annotations

from typing import Any

from harness import machine


def pytest_report_header() -> str:
    """Head the figures with the machine that they belong to."""
    info = machine()
    note = "REHEARSAL without a GPU: " if info["rehearsal"] else ""
    return (
        f"{note}{info['device']}, driver {info['driver']}, torch {info['torch']}, "
        f"triton {info['triton']}, commit {info['commit']}"
    )


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Add the machine that `harness.machine` describes."""
    output_json["machine"] = machine()
