"""Tables and pictures of one benchmark run: ``python bench/report.py FILE.json [-o OUT_DIR]``.

Writes ``report.md``, one Markdown table per stage with every contender that was measured, whoever
wins, and beside it a PNG for each sweep that the file holds (plots.py; needs matplotlib, the extra
``plot``). What was skipped, failed or could not be drawn is named with the reason. Takes what a run
writes and what ``bench/results`` keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from figures import (
    BYTE_UNITS,
    LATE,
    OURS,
    TIME_UNITS,
    Case,
    Refused,
    Run,
    escaped,
    in_unit,
    is_floor,
    read,
)
from machine import machine_line

__all__ = ["main", "markdown", "table"]

_STAGES = {
    "fisher": "Fisher of whole models",
    "fisher_sweep": "Fisher against length and batch",
    "fisher_kernel": "Fisher, one primitive at a time",
    "topk_mask": "Global top-k mask",
    "masked_grad": "Gradient of the masked weights",
    "sparse_adam": "Optimizer step",
    "host_step": "Optimizer step of many small tensors: what the host takes",
    "train_step": "Training step",
    "host": "Host cost",
}
_BUSY = 10.0  # percent of the cores; above it the report warns. Compilers take some, too
_LEGEND = [
    "- Time: the median; beside it the middle 60 % of the repeats. Bold: the fastest of a case, "
    "its floor aside.",
    "- Ratio: time over fishfast's, above 1 is slower than fishfast. Contenders that were timed in "
    "turns with the floor are compared by their multiples of it, which a busy machine changes "
    "less than the times.",
    "- Floor: what the counted bytes take at the least, or the plain operation that is named, "
    "measured in the same run; its own rows are in italics. Above 100 %: faster than that.",
    "- Memory: the most that was held at once, of whole models and training with the weights, of "
    "all else beside its inputs. By torch's allocators; of the top-k on a CPU by the process.",
]


def markdown(run: Run, pictures: Iterable[tuple[str, str]]) -> str:
    """Return the whole report.

    Args:
        run: the file's content.
        pictures: of each plot its title, and its file's name or why it was not drawn.
    """
    info = run.machine
    lines = ["# Benchmarks", "", f"{machine_line(info)}."]
    if info.get("rehearsal"):
        lines += ["", "**REHEARSAL at toy size: shows that everything runs, measures nothing.**"]
    if (others := info.get("others_percent") or 0) > _BUSY:
        took = f"Other processes, compilers included, took {others:.0f} % of the cores"
        lines += ["", f"**{took}: not a quiet machine.**"]
    if info.get("note"):
        lines += ["", f"{info['note']}."]
    lines += [
        "",
        *_LEGEND,
    ]
    for stage in run.stages():
        lines += ["", f"## {_STAGES.get(stage, stage)}", "", *_section(run, stage)]
    lines += ["", "## Plots", ""]
    for title, result in pictures:
        drawn = result.endswith(".png")
        lines.append(f"![{title}]({result})" if drawn else f"- {title}: not drawn: {result}")
    return "\n".join(lines) + "\n"


def _section(run: Run, stage: str) -> list[str]:
    cases = run.cases(stage)
    lines = table(cases) if cases else ["No figure."]
    further = [
        f"- {case.title}: {case.ours['times_floor_further']:.2f} x floor"
        for case in cases
        if case.ours and "times_floor_further" in case.ours
    ]
    if further:
        lines += ["", "fishfast per batch after the first, which is searched for its samples:", ""]
        lines += map(escaped, further)
    for kind, entries in (("Not measured", run.skipped), ("No figure: failed", run.failed)):
        if named := _named([entry for entry in entries if entry["stage"] == stage]):
            lines += ["", f"{kind}:", "", *map(escaped, named)]
    if missing := _missing(run, stage, cases):
        lines += ["", "Not in this file:", "", *map(escaped, missing)]
    return lines


def _named(entries: list[dict[str, str]]) -> list[str]:
    """Name what has no figure: each contender with its cases, and the cases not reached in time."""
    late = dict.fromkeys((e["reason"], e["case"]) for e in entries if e["reason"].startswith(LATE))
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        if not entry["reason"].startswith(LATE):
            groups.setdefault((entry["contender"], entry["reason"]), []).append(entry["case"])
    lines = [f"- {who}{_on(cases)}: {why}" for (who, why), cases in groups.items()]
    for reason in dict.fromkeys(reason for reason, _ in late):
        cases = [case for why, case in late if why == reason]
        lines.append(f"- {len(cases)} cases, {reason}: {'; '.join(cases)}")
    return lines


def _on(cases: list[str]) -> str:
    return f", {len(cases)} cases" if len(cases) > 4 else f" on {'; '.join(filter(None, cases))}"


def _missing(run: Run, stage: str, cases: list[Case]) -> list[str]:
    """Name each contender that some cases of the stage have and others lack without a word.

    A case that was skipped before it had a title is known by its parameters alone: it stands for
    every case that its contender lacks.
    """
    titles = {case.title for case in cases}
    explained = {
        (entry["case"] if entry["case"] in titles else None, entry["contender"])
        for entry in [*run.skipped, *run.failed]
        if entry["stage"] == stage
    }
    everyone = dict.fromkeys(row["contender"] for case in cases for row in case.rows)
    lines = []
    for contender in everyone:
        lacking = [
            case.title
            for case in cases
            if all(row["contender"] != contender for row in case.rows)
            and explained.isdisjoint({(case.title, contender), (None, contender)})
        ]
        if lacking:
            named = "; ".join(lacking[:3]) + (f"; {len(lacking) - 3} more" * (len(lacking) > 3))
            lines.append(f"- {contender}: {named}")
    return lines


def table(cases: list[Case]) -> list[str]:
    """Return the lines of a Markdown table, one row per case and contender.

    Args:
        cases: of one stage.
    """
    per_sample = any(case.time_key == "us_per_sample" for case in cases)
    head = ("case", "contender", "version", "time per sample" if per_sample else "time",
            "p20 to p80", "ratio", "% of floor", "floor", "memory")  # fmt: skip
    lines = [table_row(head), table_row(["---", "---", "---", *["---:"] * 4, "---", "---:"])]
    for case in cases:
        title = escaped(case.title)
        for row in case.rows:
            lines.append(table_row([title, *_cells(case, row)]))
            title = ""
    return lines


def table_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(case: Case, row: dict[str, Any]) -> list[str]:
    key = case.time_key
    contender, time = escaped(row["contender"]), in_unit(row[key], TIME_UNITS)
    if is_floor(row):
        contender = f"*{contender}*"
    elif row is case.fastest:
        contender, time = f"**{contender}**", f"**{time}**"
    scale = row[key] / row["median_us"]
    spread = " to ".join(in_unit(scale * row[p], TIME_UNITS) for p in ("p20_us", "p80_us"))
    kinds = (row.get(f"{kind}_bytes") for kind in ("total", "resident", "peak"))
    memory = next((held for held in kinds if held is not None), None)
    percent = row.get("percent_of_floor")
    return [
        contender, escaped(row.get("version", "")), time, spread, _ratio(case, row),
        "" if percent is None or is_floor(row) else _percent(percent),
        "" if is_floor(row) else escaped(row.get("floor_name", "")),
        "" if memory is None else in_unit(memory, BYTE_UNITS),
    ]  # fmt: skip


def _ratio(case: Case, row: dict[str, Any]) -> str:
    ratio = case.ratio(row)
    return "" if ratio is None or row["contender"] == OURS else f"{ratio:.2f}"


def _percent(value: float) -> str:
    if value < 0.1:
        return "< 0.1"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Where the report goes; default: beside FILE.",
)  # fmt: skip
def main(file: Path, out: Path | None) -> None:
    """Write tables and pictures of FILE, the JSON of a benchmark run."""
    out = out or file.parent
    run = read(file)
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = _draw(run, out)
        (out / "report.md").write_text(markdown(run, pictures))
    except OSError as error:
        raise Refused(f"{error.filename or out} cannot be written: {error.strerror}") from error
    click.echo(f"{out / 'report.md'}: {run.summary}")
    for title, result in pictures:
        drawn = result.endswith(".png")
        click.echo(f"{out / result}" if drawn else f"not drawn: {title}: {result}")


def _draw(run: Run, out: Path) -> list[tuple[str, str]]:
    """Return of each plot its title, and its file's name or why there is none."""
    try:
        from plots import draw_all
    except ImportError as error:
        return [("all plots", f"{error.name} is not installed (pip install 'fishfast[plot]')")]
    pictures = draw_all(run, out)
    if any(result.endswith(".png") for _, result in pictures):
        return pictures
    return [("all plots", "no sweep over n, density, T or B and no training step here")]


if __name__ == "__main__":
    main()
