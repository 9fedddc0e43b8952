"""What got slower between two JSON files of one machine: ``python bench/compare.py OLD NEW``.

Takes what ``pytest --benchmark-json`` writes and what ``bench/results`` keeps. A case is slower
where its median grew by more than ``--tolerance`` and its middle 60 % (p20 to p80) lies above that
of before: a busy machine has a wide middle. Exits with 1 if anything is slower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import click
from figures import Run, read
from tabulate import tabulate

__all__ = ["Change", "changes", "main"]

# What a time depends on, beside the code.
_ALIKE = ("device", "driver", "threads", "rehearsal", "set")


class Change(NamedTuple):
    """One case in both files; times in microseconds."""

    name: str
    old: float
    new: float
    verdict: str

    @property
    def ratio(self) -> float:
        """New time over old time."""
        return self.new / self.old


def changes(
    old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]], tolerance: float
) -> list[Change]:
    """Return every case that both have, what got slower first.

    Args:
        old: name -> figures.
        new: name -> figures.
        tolerance: the part by which a median may grow.
    """
    found = []
    for name in old.keys() & new.keys():
        before, after = old[name], new[name]
        ratio = after["median_us"] / before["median_us"]
        if ratio > 1 + tolerance and after["p20_us"] > before["p80_us"]:
            verdict = "slower"
        elif ratio < 1 / (1 + tolerance) and after["p80_us"] < before["p20_us"]:
            verdict = "faster"
        else:
            verdict = "same"
        found.append(Change(name, before["median_us"], after["median_us"], verdict))
    return sorted(found, key=lambda change: (-change.ratio, change.name))


def _by_name(run: Run) -> dict[str, dict[str, Any]]:
    return {figures["name"]: figures for figures in run.figures}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True,
    help="By what part a median may grow.",
)  # fmt: skip
@click.pass_context
def main(context: click.Context, old: Path, new: Path, tolerance: float) -> None:
    """Print what got slower from OLD to NEW, two JSON files of one machine."""
    before, after = read(old), read(new)
    old_machine, new_machine = before.machine, after.machine
    old_figures, new_figures = _by_name(before), _by_name(after)
    for key in _ALIKE:
        if old_machine.get(key) != new_machine.get(key):
            click.echo(f"not alike: {key} {old_machine.get(key)} / {new_machine.get(key)}")
    found = changes(old_figures, new_figures, tolerance)
    rows = [(c.name, f"{c.old:.4g}", f"{c.new:.4g}", f"{c.ratio:.2f}", c.verdict) for c in found]
    headers = ("case", f"us at {old_machine.get('commit')}", f"us at {new_machine.get('commit')}",
               "new/old", "")  # fmt: skip
    click.echo(tabulate(rows, headers=headers, disable_numparse=True))
    for path, missing in ((new, old_figures.keys() - new_figures.keys()),
                          (old, new_figures.keys() - old_figures.keys())):  # fmt: skip
        for name in sorted(missing):
            click.echo(f"not in {path.name}: {name}")
    slower = [change for change in found if change.verdict == "slower"]
    click.echo(f"{len(slower)} of {len(found)} cases slower")
    context.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
