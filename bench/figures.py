"""The JSON of a benchmark run, read back: the machine, the figures, what has none and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

__all__ = [
    "BYTE_UNITS", "LATE", "OURS", "TIME_UNITS", "Case", "Figures", "Refused", "Run", "in_unit",
    "is_floor", "read",
]  # fmt: skip

OURS = "fishfast"
LATE = "no time left"  # so begins the reason of what a budget did not reach
TIME_UNITS = [(1e6, "s"), (1e3, "ms"), (1.0, "us")]
BYTE_UNITS = [(2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")]
Figures = dict[str, Any]


class Refused(click.ClickException):
    """A file, or a pair of them, that tells nothing."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """What several contenders did, one after the other.

    Args:
        stage: the benchmark's file, such as "topk_mask".
        title: of the case.
        rows: one entry of the JSON per contender, in the file's order.
    """

    stage: str
    title: str
    rows: list[Figures]

    @property
    def ours(self) -> Figures | None:
        """The row of fishfast, if it is there."""
        return next((row for row in self.rows if row["contender"] == OURS), None)

    @property
    def time_key(self) -> str:
        """The time that contenders are compared by: not all score the same number of samples."""
        return "us_per_sample" if all("us_per_sample" in r for r in self.rows) else "median_us"

    def ratio(self, row: Figures) -> float | None:
        """Return a row's time over fishfast's; None without fishfast.

        Both were timed in turns with the floor, where it is a call: then this is the ratio of their
        multiples of it, which a busy machine changes less than the times.
        """
        if self.ours is None:
            return None
        if "times_fishfast" in row:
            return float(row["times_fishfast"])
        key = "times_floor" if "times_floor" in row.keys() & self.ours.keys() else self.time_key
        return float(row[key] / self.ours[key])

    @property
    def fastest(self) -> Figures | None:
        """The fastest row that is not the floor itself."""
        racing = [row for row in self.rows if not is_floor(row)]
        return min(racing, key=lambda row: self.ratio(row) or row[self.time_key], default=None)


@dataclasses.dataclass(frozen=True)
class Run:
    """One file of figures.

    Args:
        machine: what ``machine.machine`` told.
        figures: one entry per case and contender, each with ``stage``, ``case``, ``contender``.
        skipped: what was not measured: ``stage``, ``case``, ``contender`` and ``reason``.
        failed: what was wrong or broke, and so has no figure.
    """

    machine: dict[str, Any]
    figures: list[Figures]
    skipped: list[dict[str, str]]
    failed: list[dict[str, str]]

    def stages(self) -> list[str]:
        """Return every stage, in the file's order."""
        entries: Iterable[Figures] = [*self.figures, *self.skipped, *self.failed]
        return list(dict.fromkeys(entry["stage"] for entry in entries))

    def cases(self, stage: str) -> list[Case]:
        """Return the cases of a stage, in the file's order."""
        titles: dict[str, list[Figures]] = {}
        for entry in self.figures:
            if entry["stage"] == stage:
                titles.setdefault(entry["case"], []).append(entry)
        return [Case(stage, title, rows) for title, rows in titles.items()]


def is_floor(row: Figures) -> bool:
    """Return whether a row is the floor that others are held against."""
    return row["contender"] == row.get("floor_name")


def in_unit(value: float, units: list[tuple[float, str]]) -> str:
    """Return three digits in the largest unit of which there is a whole one.

    Args:
        value: in the smallest of the units.
        units: `TIME_UNITS` or `BYTE_UNITS`.
    """
    size, name = next((unit for unit in units if abs(value) >= unit[0]), units[-1])
    number = value / size
    digits = max(0, 2 - (len(str(int(abs(number)))) - 1))
    return f"{number:.{digits}f} {name}"


def read(path: Path) -> Run:
    """Read what a run wrote, or what ``bench/results`` keeps.

    Args:
        path: a JSON file of benchmarks.

    Raises:
        Refused: the file has no figures of ours.
    """
    try:
        content = json.loads(path.read_text())
        entries = [_flat(entry) for entry in content["benchmarks"]]
        machine = content["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} has no benchmark figures: {error!r}") from error
    return Run(
        machine=machine,
        figures=[entry for entry in entries if "median_us" in entry],
        skipped=content.get("skipped", []),
        failed=content.get("failed", []),
    )


def _flat(entry: dict[str, Any]) -> Figures:
    """Return an entry with its figures beside its name, as pytest-benchmark's own JSON has not."""
    figures = {"name": entry["name"], **entry.get("extra_info", entry)}
    figures.setdefault("stage", "unnamed")
    figures.setdefault("case", figures["name"])
    figures.setdefault("contender", OURS)
    return figures
