"""bench/readme_tables.py: README's figures are those of the kept run, whoever wins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from figures import Refused, Run, read  # noqa: E402
from readme_tables import tables, with_tables  # noqa: E402

KEPT = ROOT / "bench" / "results" / "cpu-amd-epyc-2-threads.json"
README = (ROOT / "README.md").read_text()


def test_readme_has_the_figures_of_the_kept_run():
    run = read(KEPT)
    assert with_tables(README, tables(run)) == README
    assert f"fishfast at commit {run.machine['commit']}" in README


def test_others_are_multiples_of_ours_and_the_fastest_is_bold():
    rows = {
        cells[1]: cells[2:4]
        for cells in (line.split(" | ") for line in tables(made_up())["topk_mask"].splitlines())
        for cells in [["", *(cell.strip("| ") for cell in cells)]]
    }
    assert rows["small"] == ["20.0 ms (3.00 MiB)", "**0.50 x (6.00 MiB)**"]
    assert rows["large"] == ["**40.0 ms (3.00 MiB)**", "12 x (6.00 MiB)"]
    assert rows["alone"] == ["**40.0 ms (3.00 MiB)**", "-"]


def test_a_run_without_a_stage_is_refused():
    run = made_up()
    partial = Run(run.machine, [f for f in run.figures if f["stage"] != "fisher"], [], [])
    with pytest.raises(Refused, match="no figures of fisher, which README shows"):
        tables(partial)


@pytest.mark.parametrize("places", [0, 2])
def test_a_readme_without_one_place_for_a_table_is_refused(places):
    with pytest.raises(Refused, match=f"README has {places} places for the table of topk_mask"):
        with_tables("<!-- bench: topk_mask -->\n<!-- /bench -->\n" * places, {"topk_mask": "x"})


def made_up() -> Run:
    """Return the kept run with three top-k cases in the place of its own."""
    kept = read(KEPT)
    times = [
        ("small", "fishfast", 20_000), ("small", "other", 10_000),
        ("large", "fishfast", 40_000), ("large", "other", 480_000), ("alone", "fishfast", 40_000),
    ]  # fmt: skip
    figures = [
        {
            "stage": "topk_mask", "case": case, "contender": contender, "median_us": us,
            "times_floor": us / 1000, "resident_bytes": 2**20 * (3 if "fish" in contender else 6),
        }
        for case, contender, us in times
    ]  # fmt: skip
    others = [figure for figure in kept.figures if figure["stage"] != "topk_mask"]
    return Run(kept.machine, others + figures, [], [])
