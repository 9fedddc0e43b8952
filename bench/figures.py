"""The JSON of a benchmark run, read back: the machine, the figures, what has none and why."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

__all__ = [
    "BYTE_UNITS", "LATE", "OURS", "TIME_UNITS", "Case", "Figures", "Refused", "Run", "escaped",
    "in_unit", "is_floor", "read",
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

    @property
    def summary(self) -> str:
        """How much was measured, and what failed, in a line."""
        broken = dict.fromkeys(f"{e['contender']} on {e['case']}" for e in self.failed)
        failed = f", {len(broken)} failed: {'; '.join(broken)}" if broken else ""
        return f"{len(self.figures)} figures{failed}"

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


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in a table's cell, too."""
    return re.sub(r"([\\`*<|])", r"\\\1", text)


def read(path: Path) -> Run:
    """Read what a run wrote, or what ``bench/results`` keeps.

    Here, and here only, everything is checked that reports, plots and comparisons rely on. A null
    stands for what is not there.

    Args:
        path: a JSON file of benchmarks.

    Raises:
        Refused: the file has no figures of ours, or one that cannot be; it is named.
    """
    try:
        content = json.loads(path.read_text())
        found = {key: content[key] for key in ("machine", "benchmarks")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} has no benchmark figures: {error!r}") from error
    try:
        return Run(
            machine=_machine(found["machine"]),
            figures=_rows(found["benchmarks"]),
            skipped=_entries(content, "skipped"),
            failed=_entries(content, "failed"),
        )
    except Refused as error:
        raise Refused(f"{path}: {error}") from error


def _machine(machine: Any) -> dict[str, Any]:
    machine = _checked(machine, "machine")
    for name, devices in machine.get("fishfast", {}).get("operations", {}).items():
        _checked(devices, f"machine, operation {name}")
    return machine


def _rows(entries: Any) -> list[Figures]:
    """Return the entries flat, as pytest-benchmark's own JSON has them not."""
    rows: dict[tuple[str, str, str], Figures] = {}
    for where, entry in _named(entries, "benchmarks"):
        entry = _checked(entry, where)
        own = _checked(entry.get("extra_info", entry), where)
        name = entry.get("name")
        defaults = {"name": name, "stage": "unnamed", "case": name, "contender": OURS}
        row = _checked({**defaults, **own}, where, *_FIGURES)
        key = (row["stage"], row["case"], row["contender"])
        if rows.setdefault(key, row) is not row:
            raise Refused(f"{where} is the second of {', '.join(key)}")
    return list(rows.values())


def _entries(content: dict[str, Any], key: str) -> list[dict[str, str]]:
    return [_checked(e, where, *_REASONS) for where, e in _named(content.get(key, []), key)]


def _named(entries: Any, key: str) -> list[tuple[str, Any]]:
    """Return each entry of a list with the words that name it."""
    if not isinstance(entries, list):
        raise Refused(f"{key} must be a list, got {entries!r:.60}")
    names = (e.get("name", "no name") if isinstance(e, dict) else "no entry" for e in entries)
    return [(f"{key}[{p}] ({n})", e) for p, (n, e) in enumerate(zip(names, entries, strict=True))]


def _checked(entry: Any, where: str, *required: str) -> dict[str, Any]:
    """Return what an entry tells, without nulls, each text on one line."""
    if not isinstance(entry, dict):
        raise Refused(f"{where} must be a dictionary, got {entry!r:.60}")
    told = {key: value for key, value in entry.items() if value is not None}
    for key in dict.fromkeys([*required, *told]):
        for keys, rule, holds in _RULES:
            if keys.fullmatch(key) and not holds(told.get(key)):
                raise Refused(f"{where}: {key} must be {rule}, got {told.get(key)!r:.60}")
        if isinstance(told.get(key), str):
            told[key] = " ".join(told[key].split())
        elif isinstance(told.get(key), dict):
            told[key] = _checked(told[key], f"{where}, {key}")
    return told


def _is_number(value: Any) -> bool:  # NaN compares as false
    return type(value) in (int, float) and -_MOST < value < _MOST


_MOST = 1e18  # bytes, or microseconds; quotients of what is below stay finite
_REASONS = ("stage", "case", "contender", "reason")
_FIGURES = ("name", "stage", "case", "contender", "median_us", "p20_us", "p80_us")
_RULES: list[tuple[re.Pattern[str], str, Callable[[Any], bool]]] = [
    (
        re.compile("name|stage|case|contender|reason|version|floor_name|model|kind|values|dtype"),
        "text",
        lambda value: isinstance(value, str),
    ),
    (
        re.compile(r".*_us|us_per_sample|times_.*|num_.*|density|length|batch|rank|threads"),
        "a finite number above 0",
        lambda value: _is_number(value) and value > 1 / _MOST,
    ),
    (
        re.compile(r".*_bytes|percent_of_floor|others_percent"),
        "a finite number of at least 0",
        lambda value: _is_number(value) and value >= 0,
    ),
    (
        re.compile("peers|fishfast|operations"),
        "a dictionary",
        lambda value: isinstance(value, dict),
    ),
    (re.compile("percent_saved"), "a finite number", _is_number),
]


if __name__ == "__main__":
    import sys

    try:
        print(read(Path(sys.argv[1])).summary)
    except Refused as refused:
        sys.exit(str(refused))
