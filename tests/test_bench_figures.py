"""bench/figures.py: a file that cannot be is refused in one line, which names it and the entry."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import compare  # noqa: E402
import report  # noqa: E402
from figures import Refused, Run, read  # noqa: E402
from readme_tables import tables  # noqa: E402

ROW = {
    "name": "bench[a]", "stage": "topk_mask", "case": "a", "contender": "fishfast",
    "version": "fishfast 1", "median_us": 2.0, "p20_us": 1.0, "p80_us": 3.0, "peak_bytes": 0,
}  # fmt: skip
LOST = {"stage": "topk_mask", "case": "a", "contender": "CUB", "reason": "it is wrong"}
GOOD = {"machine": {"device": "a card"}, "benchmarks": [ROW], "skipped": [], "failed": [LOST]}


def write(folder: Path, content: Any) -> Path:
    path = folder / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(*place: Any, value: Any) -> dict[str, Any]:
    """Return a good file with one thing changed; missing where the value is ``...``."""
    content = copy.deepcopy(GOOD)
    inner: Any = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if value is ...:
        del inner[place[-1]]
    return content


ROW_0 = "benchmarks[0] (bench[a])"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no benchmark figures: JSONDecodeError"),
        ("<html>", "has no benchmark figures: JSONDecodeError"),
        ("[]", "has no benchmark figures: TypeError"),
        (changed("machine", value=...), "has no benchmark figures: KeyError('machine')"),
        (changed("machine", value="a"), "machine must be a dictionary, got 'a'"),
        (changed("machine", "peers", value=[1]), "machine: peers must be a dictionary, got [1]"),
        (
            changed("machine", "fishfast", value={"operations": {"fisher": "cpu"}}),
            "machine, operation fisher must be a dictionary, got 'cpu'",
        ),
        (changed("machine", "others_percent", value="2"), "others_percent must be a finite number"),
        (changed("benchmarks", value={}), "benchmarks must be a list, got {}"),
        (changed("benchmarks", 0, value=3), "benchmarks[0] (no entry) must be a dictionary, got 3"),
        (changed("benchmarks", 0, "median_us", value=...), f"{ROW_0}: median_us must be a finite"),
        (changed("benchmarks", 0, "median_us", value=0), f"{ROW_0}: median_us must be a finite"),
        (changed("benchmarks", 0, "p20_us", value=None), f"{ROW_0}: p20_us must be a finite"),
        (changed("benchmarks", 0, "p80_us", value="3"), f"{ROW_0}: p80_us must be a finite"),
        (changed("benchmarks", 0, "times_floor", value=float("nan")), "above 0, got nan"),
        (changed("benchmarks", 0, "floor_us", value=10**400), f"{ROW_0}: floor_us must be a fin"),
        (changed("benchmarks", 0, "density", value=True), f"{ROW_0}: density must be a finite"),
        (changed("benchmarks", 0, "peak_bytes", value=-1), "peak_bytes must be a finite number of"),
        (changed("benchmarks", 0, "contender", value=7), f"{ROW_0}: contender must be text, got 7"),
        (changed("benchmarks", value=[ROW, ROW]), "benchmarks[1] (bench[a]) is the second of"),
        (changed("failed", 0, "reason", value=...), "failed[0] (no name): reason must be text"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, content: Any, words: str) -> None:
    path = write(tmp_path, content)
    good = tmp_path / "good.json"
    good.write_text(json.dumps(GOOD))
    for main, arguments in ((report.main, [path]), (compare.main, [good, path])):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 2
        (line,) = result.output.splitlines()
        assert line.startswith(f"Error: {path}")
        assert words in line


def test_null_is_what_is_not_there(tmp_path: Path) -> None:
    row = {**ROW, "version": None, "floor_us": None, "percent_of_floor": None, "peak_bytes": None}
    lines = report.table(read(write(tmp_path, {**GOOD, "benchmarks": [row]})).cases("topk_mask"))
    cells = [cell.strip() for cell in lines[-1].split("|")]
    assert cells[1:-1] == ["a", "**fishfast**", "", "**2.00 us**", "1.00 us to 3.00 us", *[""] * 4]


def test_titles_and_reasons_stay_one_cell_and_no_markup(tmp_path: Path) -> None:
    row = {**ROW, "case": "a|b\n*c* <d>", "contender": "`e`"}
    lost = {**LOST, "reason": "got <class 'int'>\nhere"}
    run = read(write(tmp_path, {**GOOD, "benchmarks": [row], "failed": [lost]}))
    text = report.markdown(run, [])
    assert r"| a\|b \*c\* \<d> | **\`e\`** | fishfast 1 |" in text
    assert r"- CUB on a: got \<class 'int'> here" in text


def test_what_failed_is_in_the_summary(tmp_path: Path) -> None:
    assert read(write(tmp_path, GOOD)).summary == "1 figures, 1 failed: CUB on a"
    only = read(write(tmp_path, {**GOOD, "benchmarks": []}))
    assert only.summary == "0 figures, 1 failed: CUB on a"
    assert "No figure.\n\nNo figure: failed:\n\n- CUB on a: it is wrong" in report.markdown(
        only, []
    )


@pytest.mark.parametrize("place", ["x.json/out", "full"])
def test_a_report_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "full" / "report.md").mkdir(parents=True)
    path = write(tmp_path, GOOD)
    result = CliRunner().invoke(report.main, [str(path), "-o", str(tmp_path / place)])
    assert result.exit_code == 2
    assert result.output.startswith(f"Error: {tmp_path / place}")
    assert "cannot be written: " in result.output


@pytest.mark.parametrize(
    ("machine", "row", "words"),
    [
        ({"commit": ...}, {}, "the file's machine has no commit, which README shows"),
        ({}, {"times_floor": ...}, "fisher: .*: a row has no 'times_floor', which README shows"),
    ],
)
def test_readme_takes_nothing_that_is_not_there(
    machine: dict[str, Any], row: dict[str, Any], words: str
) -> None:
    kept = read(BENCH / "results" / "cpu-amd-epyc-2-threads.json")
    told = {k: v for k, v in kept.machine.items() if k not in machine}
    figures = [{k: v for k, v in f.items() if k not in row} for f in kept.figures]
    with pytest.raises(Refused, match=words):
        tables(Run(told, figures, [], []))
