"""What got slower between two JSON files of one machine: ``python bench/compare.py OLD NEW``.

Takes what ``pytest --benchmark-json`` writes and what ``bench/results`` keeps. A case is slower
where its median grew by more than ``--tolerance``, and its middle 60 % (p20 to p80) lies above that
of before: within that, two runs of the same code are the same. Where its floor, measured in the
same run, grew as much, the machine was slower: "slower, as its floor". Exit code: 0 nothing is
slower, 1 something is, 2 the files cannot be compared.

Times of another device, another number of threads or of toy size are refused (``--anyway`` prints
them all the same). Other versions of what the times depend on are named first, and a case that has
another size or dtype behind the same title is left out by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import click
from figures import TIME_UNITS, Figures, Refused, Run, in_unit, read
from tabulate import tabulate

__all__ = ["Change", "changes", "main"]

# Without the same of these, times say nothing about the code.
_REQUIRED = ("device", "threads", "rehearsal")
# What a time depends on, too: a difference may be theirs.
_VERSIONS = ("set", "driver", "cuda", "torch", "triton", "python", "os")
# What a case computes; its title does not say all of it.
_WORK = (
    "dtype", "values", "model", "num_params", "num_selected", "density", "num_tensors",
    "num_samples", "batch", "length", "rank",
)  # fmt: skip

Key = tuple[str, str]


class Change(NamedTuple):
    """One case in both files; times in microseconds."""

    title: str
    old: float
    new: float
    floor_ratio: float | None
    verdict: str

    @property
    def ratio(self) -> float:
        """New time over old time."""
        return self.new / self.old


def changes(old: dict[Key, Figures], new: dict[Key, Figures], tolerance: float) -> list[Change]:
    """Return every case that both have, what got slower first.

    Args:
        old: figures by name and case.
        new: figures by name and case.
        tolerance: the part by which a median may grow.
    """
    found = []
    for key in old.keys() & new.keys():
        before, after = old[key], new[key]
        floor = None
        if "floor_us" in before and "floor_us" in after:
            floor = after["floor_us"] / before["floor_us"]
        ratio = after["median_us"] / before["median_us"]
        verdict = "same"
        if ratio > 1 + tolerance and after["p20_us"] > before["p80_us"]:
            as_floor = floor is not None and ratio <= floor * (1 + tolerance)
            verdict = "slower, as its floor" if as_floor else "slower"
        elif ratio < 1 / (1 + tolerance) and after["p80_us"] < before["p20_us"]:
            as_floor = floor is not None and ratio >= floor / (1 + tolerance)
            verdict = "faster, as its floor" if as_floor else "faster"
        times = before["median_us"], after["median_us"]
        found.append(Change(_title(after), *times, floor, verdict))
    return sorted(found, key=lambda change: (-change.ratio, change.title))


def _title(figures: Figures) -> str:
    if figures["case"] == figures["name"]:  # pytest-benchmark's own JSON
        return str(figures["name"])
    return f"{figures['stage']}: {figures['case']}, {figures['contender']}"


def _by_key(run: Run) -> dict[Key, Figures]:
    return {(figures["name"], figures["case"]): figures for figures in run.figures}


def _differences(old: Run, new: Run) -> tuple[list[str], list[str]]:
    """Return what keeps the files from being compared, and what may explain a difference."""
    before, after = _told(old.machine), _told(new.machine)

    def unlike(keys: Iterable[str]) -> list[str]:
        return [
            f"{key}: {before.get(key, 'not told')} / {after.get(key, 'not told')}"
            for key in keys
            if before.get(key) != after.get(key)
        ]

    both = (key for key in before.keys() & after.keys() if " " in key)
    return unlike(_REQUIRED), unlike([*_VERSIONS, *sorted(both)])


def _told(machine: dict[str, Any]) -> dict[str, Any]:
    """Return what a machine says of itself, with its peers and what runs where as flat keys."""
    told = dict(machine)
    for name, version in machine.get("peers", {}).items():
        told[f"version of {name}"] = version
    for name, devices in machine.get("fishfast", {}).get("operations", {}).items():
        for device, implementation in devices.items():
            told[f"{name} on {device}"] = implementation
    return told


def _other_work(before: Figures, after: Figures) -> str:
    """Return what one title hides: other sizes, or another dtype; "" if nothing."""
    differing = (k for k in _WORK if k in before and k in after and before[k] != after[k])
    return ", ".join(f"{key} {before[key]} / {after[key]}" for key in differing)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True,
    help="By what part a median may grow.",
)  # fmt: skip
@click.option("--anyway", is_flag=True, help="Compare times of unlike machines too.")
@click.pass_context
def main(context: click.Context, old: Path, new: Path, tolerance: float, anyway: bool) -> None:
    """Print what got slower from OLD to NEW, two JSON files of one machine."""
    before, after = read(old), read(new)
    unlike, versions = _differences(before, after)
    if unlike and not anyway:
        raise Refused(
            f"{old.name} and {new.name} are not of one machine and size ({'; '.join(unlike)}): "
            "their times say nothing about the code; --anyway compares them all the same"
        )
    for difference in [*unlike, *versions]:
        click.echo(f"not alike: {difference}")
    old_figures, new_figures = _by_key(before), _by_key(after)
    for key in sorted(old_figures.keys() & new_figures.keys()):
        if other := _other_work(old_figures[key], new_figures[key]):
            click.echo(f"not the same work: {_title(new_figures[key])}: {other}")
            del old_figures[key], new_figures[key]
    found = changes(old_figures, new_figures, tolerance)
    if not found:
        raise Refused(f"{old.name} and {new.name} have no case in common")
    _print(found, before, after)
    for path, figures, others in ((new, old_figures, new_figures), (old, new_figures, old_figures)):
        for title in sorted(_title(figures[key]) for key in figures.keys() - others.keys()):
            click.echo(f"not in {path.name}: {title}")
    slower = [change for change in found if change.verdict == "slower"]
    click.echo(f"{len(slower)} of {len(found)} cases slower")
    context.exit(1 if slower else 0)


def _print(found: list[Change], before: Run, after: Run) -> None:
    rows = [
        (
            change.title,
            in_unit(change.old, TIME_UNITS),
            in_unit(change.new, TIME_UNITS),
            f"{change.ratio:.2f}",
            "" if change.floor_ratio is None else f"{change.floor_ratio:.2f}",
            change.verdict,
        )
        for change in found
    ]
    commits = (f"at {run.machine.get('commit')}" for run in (before, after))
    headers = ("case", *commits, "new/old", "of the floor", "")
    click.echo(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
