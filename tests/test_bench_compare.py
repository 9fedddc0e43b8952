"""bench/compare.py: what got slower between two JSON files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from compare import main  # noqa: E402

MACHINE = {"device": "a card", "driver": "1", "threads": 2, "rehearsal": False, "commit": "abc"}


def file_of(folder, name, times, raw=False, **machine):
    """Write figures as they are kept, or as pytest-benchmark writes them."""
    cases = []
    for case, (p20, median, p80) in times.items():
        figures = {"median_us": median, "p20_us": p20, "p80_us": p80}
        cases.append({"name": case, **({"extra_info": figures} if raw else figures)})
    path = folder / name
    path.write_text(json.dumps({"machine": {**MACHINE, **machine}, "benchmarks": cases}))
    return str(path)


def run(*arguments):
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.mark.parametrize("raw", [False, True], ids=["kept", "raw"])
def test_what_got_slower_is_first_and_fails(tmp_path, raw):
    old = file_of(tmp_path, "old.json", {"a": (9, 10, 11), "b": (9, 10, 11), "c": (9, 10, 11)})
    new = file_of(tmp_path, "new.json", {"a": (9, 10, 12), "b": (19, 20, 21), "c": (4, 5, 6)}, raw)
    result = run(old, new)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["b", "a", "c"]
    assert lines[2].split()[1:] == ["10", "20", "2.00", "slower"]
    assert lines[3].endswith("same")
    assert lines[4].endswith("faster")
    assert lines[-1] == "1 of 3 cases slower"


@pytest.mark.parametrize(
    "times", [(9.9, 10.4, 11), (8, 14, 20)], ids=["within the tolerance", "within the spread"]
)
def test_noise_is_not_slower(tmp_path, times):
    old = file_of(tmp_path, "old.json", {"a": (9, 10, 11)})
    result = run(old, file_of(tmp_path, "new.json", {"a": times}))
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "0 of 1 cases slower"


def test_a_smaller_tolerance_is_stricter(tmp_path):
    old = file_of(tmp_path, "old.json", {"a": (10, 10, 10)})
    new = file_of(tmp_path, "new.json", {"a": (10.3, 10.3, 10.3)})
    assert run(old, new).exit_code == 0
    assert run(old, new, "--tolerance", "0.02").exit_code == 1


def test_other_machines_and_cases_are_named(tmp_path):
    old = file_of(tmp_path, "old.json", {"a": (1, 1, 1), "gone": (1, 1, 1)})
    new = file_of(tmp_path, "new.json", {"a": (1, 1, 1), "added": (1, 1, 1)}, device="another")
    output = run(old, new).output
    assert "not alike: device a card / another" in output
    assert "not in new.json: gone" in output
    assert "not in old.json: added" in output


def test_a_file_without_figures_is_refused(tmp_path):
    old = file_of(tmp_path, "old.json", {"a": (1, 1, 1)})
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    result = run(old, str(bad))
    assert result.exit_code == 1
    assert "has no benchmark figures" in result.output


def test_the_committed_figures_equal_themselves():
    kept = sorted((BENCH / "results").glob("*.json"))
    assert kept
    for path in kept:
        assert run(str(path), str(path)).exit_code == 0
