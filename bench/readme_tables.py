"""README's tables of what things cost: ``python bench/readme_tables.py bench/results/FILE.json``.

README holds them between ``<!-- bench: STAGE -->`` and ``<!-- /bench -->``; what stands there is
replaced by the file's figures, and a test holds README against the kept file. Others are given as
multiples of fishfast, each timed in turns with the same floor: they repeat where times do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click
from figures import (
    BYTE_UNITS,
    OURS,
    TIME_UNITS,
    Case,
    Figures,
    Refused,
    Run,
    escaped,
    in_unit,
    is_floor,
)
from figures import read as read_run
from report import table_row

__all__ = ["main", "tables", "with_tables"]

_NONE = "-"  # a contender that does not run on a case; the report says why
# Of the layers, one of each kind, and of a convolution, which is like the dense one, one density.
_LAYERS = ("linear 1024 x 3072 x 768, ", "embedding 30522 x 768, ", "conv3x3 256, 14 x 14, 2 %")


def tables(run: Run) -> dict[str, str]:
    """Return stage -> Markdown, of every stage that README shows.

    Args:
        run: a whole run of the benchmarks.

    Raises:
        Refused: the run lacks one of them.
    """
    found = {}
    for stage, make in _STAGES.items():
        cases = [case for case in run.cases(stage) if case.ours is not None]
        if not cases:
            raise Refused(f"the file has no figures of {stage}, which README shows")
        found[stage] = "\n".join(make(cases))
    return {"machine": _machine(run), **found}


def with_tables(readme: str, found: dict[str, str]) -> str:
    """Return README with its tables replaced.

    Args:
        readme: its text.
        found: of `tables`.

    Raises:
        Refused: README has no place for one of them, or more than one.
    """
    for stage, text in found.items():
        place = re.compile(rf"(<!-- bench: {stage} -->\n).*?(<!-- /bench -->)", re.DOTALL)
        readme, count = place.subn(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme)
        if count != 1:
            raise Refused(f"README has {count} places for the table of {stage}, not one")
    return readme


def _machine(run: Run) -> str:
    told = run.machine
    shown = ("device", "threads", "os", "torch", "peers", "commit", "others_percent")
    if lacking := [key for key in shown if key not in told]:
        raise Refused(f"the file's machine has no {', '.join(lacking)}, which README shows")
    peers = "".join(f", {name} {version}" for name, version in told["peers"].items())
    return (
        f"{told['device']}, {told['threads']} threads, {told['os']}, torch {told['torch']}{peers}; "
        f"fishfast at commit {told['commit']}. "
        f"Other processes took {told['others_percent']:.0f} % of the cores."
    )


def _fisher(cases: list[Case]) -> list[str]:
    """Times a plain forward and backward, and peak memory."""

    def cell(case: Case, row: Figures) -> str:
        return f"{row['times_floor']:.2f} ({in_unit(row['peak_bytes'], BYTE_UNITS)})"

    return _by_contender("model", cases, cell)


def _topk_mask(cases: list[Case]) -> list[str]:
    """Time of ours, the factor to ours of the others, and memory beside the scores."""
    return _by_contender("scores, density, tensors", cases, _time_or_factor("resident_bytes"))


def _sparse_adam(cases: list[Case]) -> list[str]:
    return _by_contender("weights, density, tensors", cases, _time_or_factor())


def _masked_grad(cases: list[Case]) -> list[str]:
    shown = [case for case in cases if case.title.startswith(_LAYERS)]
    return _by_contender("layer, density", shown, _time_or_factor("peak_bytes"), floors=True)


def _train_step(cases: list[Case]) -> list[str]:
    """The same with all that training holds, and what it saves of full fine-tuning's."""
    cell = _time_or_factor("total_bytes")

    def with_saved(case: Case, row: Figures) -> str:
        saved = row["percent_saved"]
        return cell(case, row) + (f", saves {saved:.0f} %" if abs(saved) >= 0.5 else "")

    return _by_contender("model", cases, with_saved)


def _host(cases: list[Case]) -> list[str]:
    """CPU time as a multiple of full fine-tuning's."""
    return _by_contender(
        "tiny tensors, CPU time", cases, lambda _, row: f"{row['times_floor']:.2f}"
    )


Cell = Callable[[Case, Figures], str]


def _time_or_factor(memory: str | None = None) -> Cell:
    """Return what writes our own time, the others' factor to it, and the bytes of ``memory``."""

    def cell(case: Case, row: Figures) -> str:
        ratio = case.ratio(row)
        assert ratio is not None
        ours = row["contender"] == OURS
        text = in_unit(row["median_us"], TIME_UNITS) if ours else f"{_digits(ratio)} x"
        if memory in row:
            text += f" ({in_unit(row[memory], BYTE_UNITS)})"
        return text

    return cell


def _digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _by_contender(head: str, cases: list[Case], cell: Cell, floors: bool = False) -> list[str]:
    """Return a row per case and a column per contender; the fastest is bold."""
    rows = [row for case in cases for row in case.rows if floors or not is_floor(row)]
    others = dict.fromkeys(row["contender"] for row in rows if row["contender"] != OURS)
    contenders = [OURS, *others]
    lines = [
        table_row([head, *map(escaped, contenders)]),
        table_row(["---", *["---:"] * len(contenders)]),
    ]
    for case in cases:
        shown = {row["contender"]: row for row in case.rows if row["contender"] in contenders}
        try:
            cells = {contender: cell(case, row) for contender, row in shown.items()}
        except KeyError as key:
            where = f"{case.stage}: {case.title}"
            raise Refused(f"{where}: a row has no {key}, which README shows") from key
        fastest = min(shown, key=lambda contender: case.ratio(shown[contender]) or 1.0)
        cells[fastest] = f"**{cells[fastest]}**"
        lines.append(
            table_row([escaped(case.title), *(cells.get(who, _NONE) for who in contenders)])
        )
    return lines


_STAGES: dict[str, Callable[[list[Case]], list[str]]] = {
    "fisher": _fisher,
    "topk_mask": _topk_mask,
    "sparse_adam": _sparse_adam,
    "host": _host,
    "train_step": _train_step,
    "masked_grad": _masked_grad,
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(file: Path) -> None:
    """Put FILE's figures into README's tables."""
    readme = Path(__file__).resolve().parents[1] / "README.md"
    readme.write_text(with_tables(readme.read_text(), tables(read_run(file))))


if __name__ == "__main__":
    main()
