"""What got slower between JSON files of one machine: ``python bench/compare.py OLD NEW [NEW ...]``.

Takes what ``pytest --benchmark-json`` writes and what ``bench/results`` keeps. Compared are times
as multiples of the floor, which was timed in turns with them: a machine that was slower throughout
changes both. A case is slower where its multiple grew by more than ``--tolerance`` and by more than
the noise, its middle 60 % (p20 to p80) lies above that of before, and its time is no shorter.

The noise is what changed though nothing did: of the rows of other packages, in the same versions,
nine in ten changed by no more. Each stage has its own where it has enough of them. What changed
more among those rows is called noise, too. So of our rows, of which there are some fifty, a few may
seem slower in one run: several new runs are each compared with the old one, and slower is what was
so in every one.

Exit code: 0 nothing is slower, 1 something is, 2 the files cannot be compared.

Times of another device, another number of threads or of toy size are refused (``--anyway`` prints
them all the same). Other versions of what the times depend on are named first, and a case that has
another size or dtype behind the same title is left out by name.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import click
from figures import OURS, TIME_UNITS, Figures, Refused, Run, in_unit, is_floor, read
from tabulate import tabulate

__all__ = ["Change", "changes", "main", "noise"]

# Without the same of these, times say nothing about the code.
_REQUIRED = ("device", "threads", "rehearsal")
# What a time depends on, too: a difference may be theirs.
_VERSIONS = ("set", "driver", "cuda", "torch", "triton", "python", "os")
# What a case computes; its title does not say all of it.
_WORK = (
    "dtype", "values", "model", "num_params", "num_selected", "density", "num_tensors",
    "num_samples", "batch", "length", "rank",
)  # fmt: skip

_MULTIPLES = ("times_floor_p20", "times_floor", "times_floor_p80")
_FEWEST_ROWS = 10  # that tell a stage's noise

Key = tuple[str, str, str]  # stage, case, contender


class Change(NamedTuple):
    """One case in both files; times in microseconds.

    Attributes:
        time_ratio: new time over old time.
        ratio: new over old, of the multiple of the floor where both have one, else of the time.
    """

    title: str
    old: float
    new: float
    ratio: float
    verdict: str

    @property
    def time_ratio(self) -> float:
        """New time over old time."""
        return self.new / self.old


def changes(
    old: dict[Key, Figures], new: dict[Key, Figures], tolerance: float, noises: dict[str, float]
) -> list[Change]:
    """Return every case that both have, what got slower first.

    Args:
        old: figures by stage, case and contender.
        new: figures by stage, case and contender.
        tolerance: the part by which a figure may grow.
        noises: stage -> by what factor figures of unchanged code change.
    """
    found = []
    for key in old.keys() & new.keys():
        before, after = old[key], new[key]
        (p20, middle, p80), (new_p20, new_middle, new_p80) = _compared(before, after)
        ratio, allowed = new_middle / middle, max(1 + tolerance, noises[after["stage"]])
        verdict = "same"
        took_longer = after["median_us"] >= before["median_us"]  # or its floor alone got faster
        if ratio > allowed and new_p20 > p80 and took_longer:
            verdict = "slower"
        elif ratio < 1 / allowed and new_p80 < p20:
            verdict = "faster"
        if verdict != "same" and _is_unchanged(before, after):
            verdict = "noise"
        times = before["median_us"], after["median_us"]
        found.append(Change(_title(after), *times, ratio, verdict))
    return sorted(found, key=lambda change: (-change.ratio, change.title))


def noise(old: dict[Key, Figures], new: dict[Key, Figures]) -> dict[str, float]:
    """Return by what factor figures of unchanged code differ between the files, for each stage.

    Args:
        old: figures by stage, case and contender.
        new: figures by stage, case and contender.

    Returns:
        Nine in ten of the stage's rows of other packages changed by no more, either way. A stage
        with too few of them has that of all stages; 1, if those are too few.
    """
    by_stage: dict[str, list[float]] = {}
    for key in old.keys() & new.keys():
        before, after = old[key], new[key]
        factors = by_stage.setdefault(after["stage"], [])
        if _is_unchanged(before, after) and not is_floor(after):  # which is always its own floor
            (_, middle, _), (_, new_middle, _) = _compared(before, after)
            factors.append(max(new_middle / middle, middle / new_middle))
    everywhere = _ninth_tenth([factor for factors in by_stage.values() for factor in factors]) or 1
    return {stage: _ninth_tenth(factors) or everywhere for stage, factors in by_stage.items()}


def _is_unchanged(before: Figures, after: Figures) -> bool:
    """Return whether a row is of another package, in the version of before."""
    return not after["contender"].startswith(OURS) and before.get("version") == after.get("version")


def _ninth_tenth(factors: list[float]) -> float | None:
    if len(factors) < _FEWEST_ROWS:
        return None
    return statistics.quantiles(factors, n=10, method="inclusive")[-1]


def _compared(before: Figures, after: Figures) -> list[tuple[float, float, float]]:
    """Return p20, median and p80 of both, as multiples of the floor where both have them."""
    time = ("p20_us", "median_us", "p80_us")
    keys = _MULTIPLES if _has_multiples(before, after) else time
    return [tuple(figures[key] for key in keys) for figures in (before, after)]


def _has_multiples(before: Figures, after: Figures) -> bool:
    return all(key in before and key in after for key in _MULTIPLES)


def _title(figures: Figures) -> str:
    if figures["case"] == figures["name"]:  # pytest-benchmark's own JSON
        return str(figures["name"])
    return f"{figures['stage']}: {figures['case']}, {figures['contender']}"


def _by_key(run: Run) -> dict[Key, Figures]:
    return {(row["stage"], row["case"], row["contender"]): row for row in run.figures}


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
@click.argument(
    "new", type=click.Path(exists=True, dir_okay=False, path_type=Path), nargs=-1, required=True
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True,
    help="By what part a figure may grow, noise or not.",
)  # fmt: skip
@click.option("--anyway", is_flag=True, help="Compare times of unlike machines too.")
@click.pass_context
def main(
    context: click.Context, old: Path, new: tuple[Path, ...], tolerance: float, anyway: bool
) -> None:
    """Print what got slower from OLD to every NEW, JSON files of one machine."""
    pairs = [_compare(old, path, tolerance, anyway) for path in new]
    always = [change.title for change in pairs[-1] if all(_is_slower(change, p) for p in pairs)]
    if len(new) > 1:
        for title in always:
            click.echo(f"slower in all: {title}")
        click.echo(f"{len(always)} cases slower in all {len(new)} of {', '.join(map(str, new))}")
    context.exit(1 if always else 0)


def _is_slower(change: Change, found: list[Change]) -> bool:
    return any(c.title == change.title and c.verdict == "slower" for c in found)


def _compare(old: Path, new: Path, tolerance: float, anyway: bool) -> list[Change]:
    """Print what two files differ in; return every case that both have."""
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
    noises = noise(old_figures, new_figures)
    found = changes(old_figures, new_figures, tolerance, noises)
    if not found:
        raise Refused(f"{old.name} and {new.name} have no case in common")
    _print(found, before, after)
    both = old_figures.keys() & new_figures.keys()
    if times := sum(not _has_multiples(old_figures[key], new_figures[key]) for key in both):
        click.echo(f"{times} cases without multiples of their floor in both files: by their times")
    told = ", ".join(f"{stage} {factor:.2f}" for stage, factor in sorted(noises.items()))
    click.echo(f"noise, by rows of other packages: {told}")
    for path, figures, others in ((new, old_figures, new_figures), (old, new_figures, old_figures)):
        for title in sorted(_title(figures[key]) for key in figures.keys() - others.keys()):
            click.echo(f"not in {path.name}: {title}")
    slower = sum(change.verdict == "slower" for change in found)
    click.echo(f"{slower} of {len(found)} cases slower")
    return found


def _print(found: list[Change], before: Run, after: Run) -> None:
    rows = [
        (
            change.title,
            in_unit(change.old, TIME_UNITS),
            in_unit(change.new, TIME_UNITS),
            f"{change.time_ratio:.2f}",
            f"{change.ratio:.2f}",
            change.verdict,
        )
        for change in found
    ]
    commits = (f"at {run.machine.get('commit')}" for run in (before, after))
    headers = ("case", *commits, "new/old", "compared", "")
    click.echo(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
