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


def file_of(folder, name, times, raw=False, labels=None, floor=None, **machine):
    """Write figures as they are kept, or as pytest-benchmark writes them."""
    cases = []
    for case, (p20, median, p80) in times.items():
        figures = {"median_us": median, "p20_us": p20, "p80_us": p80, **(labels or {})}
        if floor is not None:
            figures |= {
                "floor_us": floor, "times_floor_p20": p20 / floor, "times_floor": median / floor,
                "times_floor_p80": p80 / floor,
            }  # fmt: skip
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
    assert lines[2].split()[1:] == ["10.0", "us", "20.0", "us", "2.00", "2.00", "slower"]
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


def test_what_one_file_lacks_is_named(tmp_path):
    old = file_of(tmp_path, "old.json", {"a": (1, 1, 1), "gone": (1, 1, 1)})
    new = file_of(tmp_path, "new.json", {"a": (1, 1, 1), "added": (1, 1, 1)})
    output = run(old, new).output
    assert "not in new.json: gone" in output
    assert "not in old.json: added" in output


def test_a_machine_that_is_slower_is_told_from_code_that_is(tmp_path):
    old = file_of(tmp_path, "old.json", {"a": (9, 10, 11)}, floor=4.0)
    slow = file_of(tmp_path, "slow.json", {"a": (19, 20, 21)}, floor=8.0)
    code = file_of(tmp_path, "code.json", {"a": (19, 20, 21)}, floor=4.0)
    same = run(old, slow)
    assert same.exit_code == 0
    assert same.output.splitlines()[2].split()[-3:] == ["2.00", "1.00", "same"]
    assert run(old, code).exit_code == 1
    assert run(old, code).output.splitlines()[2].split()[-3:] == ["2.00", "2.00", "slower"]
    assert run(slow, code).output.splitlines()[2].split()[-3:] == ["1.00", "2.00", "slower"]


def with_others(folder, name, ours, others, version="torch 2"):
    """Write one row of ours and those of another package, as multiples of the same time."""
    path = file_of(folder, name, {"step": (ours, ours, ours)}, labels={"stage": "adam"})
    content = json.loads(Path(path).read_text())
    content["benchmarks"] += [
        {"name": f"torch {n}", "stage": "adam", "case": f"step {n}", "contender": "torch fused",
         "version": version, "median_us": us, "p20_us": us, "p80_us": us}
        for n, us in enumerate(others)
    ]  # fmt: skip
    Path(path).write_text(json.dumps(content))
    return path


def test_noise_is_what_changed_though_nothing_did(tmp_path):
    old = with_others(tmp_path, "old.json", 10, [10.0] * 20)
    # One in ten may do anything; the rest is between a fourth less and a third more.
    others = [7.5] * 9 + [40 / 3] * 9 + [100.0, 1.0]
    within = run(old, with_others(tmp_path, "within.json", 13, others))
    assert within.exit_code == 0
    assert within.output.splitlines()[-2] == "noise, by rows of other packages: adam 2.20"
    quiet = run(old, with_others(tmp_path, "quiet.json", 13, [10.1] * 20))
    assert quiet.exit_code == 1
    assert quiet.output.splitlines()[-2] == "noise, by rows of other packages: adam 1.01"
    few = with_others(tmp_path, "few.json", 13, others[:9])
    assert run(old, few).exit_code == 1
    other_version = with_others(tmp_path, "version.json", 13, others, version="torch 3")
    assert run(old, other_version).exit_code == 1


def test_what_took_less_time_is_not_slower(tmp_path):
    old = file_of(tmp_path, "old.json", {"a": (19, 20, 21)}, floor=8.0)
    new = file_of(tmp_path, "new.json", {"a": (18, 18.5, 19)}, floor=4.0)
    assert run(old, new).exit_code == 0
    assert run(old, new).output.splitlines()[2].split()[-1] == "same"


def test_slower_is_what_is_so_in_every_new_run(tmp_path):
    old = file_of(tmp_path, "old.json", {"a": (9, 10, 11), "b": (9, 10, 11)})
    once = file_of(tmp_path, "once.json", {"a": (19, 20, 21), "b": (19, 20, 21)})
    again = file_of(tmp_path, "again.json", {"a": (9, 10, 11), "b": (19, 20, 21)})
    assert run(old, once).exit_code == 1
    both = run(old, once, again)
    assert both.exit_code == 1
    assert both.output.splitlines()[-2] == "slower in all: b"
    assert both.output.splitlines()[-1].startswith("1 cases slower in all 2 of ")
    quiet = run(old, once, again, file_of(tmp_path, "quiet.json", {"b": (9, 10, 11)}))
    assert quiet.exit_code == 0
    assert quiet.output.splitlines()[-1].startswith("0 cases slower in all 3 of ")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("device", "another", "device: a card / another"),
        ("threads", 1, "threads: 2 / 1"),
        ("rehearsal", True, "rehearsal: False / True"),
    ],
)
def test_times_of_unlike_machines_are_refused(tmp_path, key, value, words):
    old = file_of(tmp_path, "old.json", {"a": (1, 1, 1)})
    new = file_of(tmp_path, "new.json", {"a": (2, 2, 2)}, **{key: value})
    result = run(old, new)
    assert result.exit_code == 2
    assert f"not of one machine and size ({words})" in result.output
    assert "slower" not in result.output
    result = run(old, new, "--anyway")
    assert result.exit_code == 1
    assert result.output.startswith(f"not alike: {words}\n")


def test_versions_are_named_and_compared(tmp_path):
    """One file may be older than a key: then it is "not told"."""

    def runs(implementation):
        return {"version": "0.1.0", "operations": {"fisher": {"cpu": implementation}}}

    times = {"a": (1, 1, 1)}
    old = file_of(tmp_path, "old.json", times, torch="2.11", peers={"peft": "1", "opacus": "1"},
                  fishfast=runs("torch"))  # fmt: skip
    new = file_of(tmp_path, "new.json", times, torch="2.13", peers={"peft": "2", "opacus": "1"},
                  fishfast=runs("cpu"), set="cpu")  # fmt: skip
    result = run(old, new)
    assert result.exit_code == 0
    assert result.output.splitlines()[:4] == [
        "not alike: set: not told / cpu", "not alike: torch: 2.11 / 2.13",
        "not alike: fisher on cpu: torch / cpu", "not alike: version of peft: 1 / 2",
    ]  # fmt: skip


def test_another_dtype_or_size_is_no_comparison(tmp_path):
    labels = {"stage": "fisher", "case": "BERT", "contender": "loop", "num_samples": 32}
    times = {"x": (1, 1, 1)}
    old = file_of(tmp_path, "old.json", times, labels={**labels, "dtype": "float32"})
    new = file_of(tmp_path, "new.json", times, labels={**labels, "dtype": "bfloat16"})
    result = run(old, new)
    assert result.exit_code == 2
    assert "not the same work: fisher: BERT, loop: dtype float32 / bfloat16" in result.output
    assert "old.json and new.json have no case in common" in result.output


def test_a_file_without_figures_is_refused(tmp_path):
    old = file_of(tmp_path, "old.json", {"a": (1, 1, 1)})
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    result = run(old, str(bad))
    assert result.exit_code == 2
    assert "has no benchmark figures" in result.output


def test_the_committed_figures_equal_themselves():
    kept = sorted((BENCH / "results").glob("*.json"))
    assert kept
    for path in kept:
        assert run(str(path), str(path)).exit_code == 0


def test_the_committed_files_are_no_pair():
    """One thread over 4 batches, two threads over 16."""
    kept = [str(BENCH / "results" / f"fisher-amd-epyc-{n}.json") for n in ("1-thread", "2-threads")]
    assert "threads: 1 / 2" in run(*kept).output
    result = run(*kept, "--anyway")
    assert result.exit_code == 2
    assert "BERT 4x512 T=128 B=8 fp32, fishfast: num_samples 32 / 128" in result.output
