"""bench/report.py: the tables have the file's numbers, and what is missing is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from report import main  # noqa: E402

MACHINE = {
    "device": "a card", "driver": "580.1", "threads": 16, "rehearsal": False, "commit": "abc1234",
    "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "date": "2026-11-23T01:02:03+00:00",
}  # fmt: skip


def figure(stage, case, contender, us, **labels):
    return {
        "name": f"{stage}[{case}-{contender}]", "stage": stage, "case": case,
        "contender": contender, "version": "torch 2.11.0", "median_us": us, "p20_us": 0.9 * us,
        "p80_us": 1.1 * us, "floor_us": 100.0, "floor_name": "one read",
        "percent_of_floor": 1e4 / us, "peak_bytes": 3 * 2**20, **labels,
    }  # fmt: skip


def topk(n, ours, theirs):
    labels = {"num_params": n, "density": 0.005, "values": "lognormal", "num_tensors": 20}
    return [
        figure("topk_mask", f"n={n}", "fishfast", ours, version="fishfast 0.1.0", **labels),
        figure("topk_mask", f"n={n}", "torch.topk", theirs, **labels),
    ]


def report(folder, figures, **rest):
    """Write a file of figures; return the report's text and what the command printed."""
    machine = {**MACHINE, **rest.pop("machine", {})}
    file = folder / "bench.json"
    file.write_text(json.dumps({"machine": machine, "benchmarks": figures, **rest}))
    result = CliRunner().invoke(main, [str(file), "-o", str(folder / "out")])
    assert result.exit_code == 0, result.output
    return (folder / "out" / "report.md").read_text(), result.output


def rows(text):
    """Return the tables' rows as lists of cells, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("case", "---")]


def test_numbers_are_those_of_the_file(tmp_path):
    text, _ = report(tmp_path, topk(10**6, ours=1234.5, theirs=24690.0))
    assert rows(text) == [
        ["n=1000000", "**fishfast**", "fishfast 0.1.0", "**1.23 ms**", "1.11 ms to 1.36 ms", "",
         "8.1", "one read", "3.00 MiB"],
        ["", "torch.topk", "torch 2.11.0", "24.7 ms", "22.2 ms to 27.2 ms", "20.00", "0.4",
         "one read", "3.00 MiB"],
    ]  # fmt: skip
    assert text.splitlines()[2] == (
        "a card, driver 580.1, torch 2.11.0, CUDA 13.0, triton 3.6.0, commit abc1234, 2026-11-23."
    )


def test_a_case_that_fishfast_loses_stays_and_the_faster_is_bold(tmp_path):
    text, _ = report(tmp_path, topk(1000, ours=500.0, theirs=50.0) + topk(10**6, 100.0, 200.0))
    contenders = [(row[1], row[5]) for row in rows(text)]
    assert contenders == [
        ("fishfast", ""), ("**torch.topk**", "0.10"), ("**fishfast**", ""), ("torch.topk", "2.00"),
    ]  # fmt: skip


def test_the_floor_is_marked_and_wins_nothing(tmp_path):
    labels = {"floor_name": "forward + backward", "us_per_sample": 10.0, "peak_bytes": 5 * 2**30}
    figures = [
        figure("fisher", "BERT", "forward + backward", 80.0, **labels),
        figure("fisher", "BERT", "fishfast", 88.0, **{**labels, "us_per_sample": 11.0},
               times_floor_further=1.067),
        figure("fisher", "BERT", "loop", 40.0, **{**labels, "us_per_sample": 40.0},
               times_fishfast=3.5),  # in turns with the floor, and scored fewer samples
    ]  # fmt: skip
    text, _ = report(tmp_path, figures)
    assert [row[1:2] + row[3:4] + row[5:6] for row in rows(text)] == [
        ["*forward + backward*", "10.0 us", "0.91"],
        ["**fishfast**", "**11.0 us**", ""],
        ["loop", "40.0 us", "3.50"],
    ]
    assert "5.00 GiB" in text
    assert "after the first, which is searched for its samples:\n\n- BERT: 1.07 x floor\n" in text
    assert "time per sample" in text


def test_what_has_no_figure_is_named(tmp_path):
    figures = topk(1000, 5.0, 6.0) + topk(2000, 5.0, 6.0)[:1]
    gone = {"stage": "train_step", "case": "BERT", "contender": "LoRA", "reason": "needs peft"}
    late = {"stage": "topk_mask", "case": "2000, 20", "contender": "slow", "reason": ""}
    figures.append(figure("topk_mask", "n=1000", "slow", 7.0))
    late = {**late, "reason": "no time left of 5 s"}
    wrong = {"stage": "topk_mask", "case": "n=1", "contender": "CUB", "reason": "it is wrong"}
    skipped = [gone, {**gone, "case": "ViT"}, late, {**late, "contender": "CUB"}]
    skipped.append({**late, "case": "3000, 20"})
    text, _ = report(tmp_path, figures, skipped=skipped, failed=[wrong])
    assert "No figure: failed:\n\n- CUB on n=1: it is wrong\n" in text
    assert "Not measured:\n\n- LoRA on BERT; ViT: needs peft\n" in text
    # By case: a time limit is no contender's fault.
    assert "Not measured:\n\n- 2 cases, no time left of 5 s: 2000, 20; 3000, 20\n" in text
    assert "Not in this file:\n\n- torch.topk: n=2000\n" in text


def test_pictures_of_what_is_there_and_reasons_for_the_rest(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: not installed")
    bars = [
        figure("train_step", "BERT", name, us, total_bytes=us * 2**20)
        for name, us in (("fishfast", 10.0), ("LoRA $\\foo$", 12.0), ("full", 30.0))  # no formula
    ]
    text, printed = report(tmp_path, topk(10**5, 5.0, 6.0) + topk(10**6, 50.0, 60.0) + bars)
    assert sorted(f.name for f in (tmp_path / "out").glob("*.png")) == ["topk_time.png",
                                                                       "training.png"]  # fmt: skip
    assert "![Top-k: time against n](topk_time.png)" in text
    reason = "stage sparse_adam has no two values of density in this file"
    assert f"- Optimizer step: time against density: not drawn: {reason}" in text
    assert f"not drawn: Optimizer step: time against density: {reason}" in printed


def test_a_line_joins_what_differs_in_n_alone(tmp_path, monkeypatch):
    """Other densities and numbers of tensors are other panels."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib: not installed")
    import plots
    from figures import Run

    figures = topk(10**5, 5.0, 6.0) + topk(10**6, 50.0, 60.0)
    figures += [{**row, "density": 0.5} for row in topk(10**7, 500.0, 600.0)]
    figures += [
        {**row, "num_tensors": 1} for row in topk(10**5, 7.0, 8.0) + topk(10**6, 70.0, 80.0)
    ]
    panels = plots._topk(Run(MACHINE, figures, [], [])).axes
    drawn = {p.get_title(): {line.get_label(): list(line.get_ydata()) for line in p.lines}
             for p in panels if p.get_visible()}  # fmt: skip
    floor = {"floor: one read": [0.1, 0.1]}
    assert drawn == {
        "lognormal, 20 tensors, density 0.5 %": {
            "fishfast": [0.005, 0.05], "torch.topk": [0.006, 0.06], **floor},
        "lognormal, 1 tensor, density 0.5 %": {
            "fishfast": [0.007, 0.07], "torch.topk": [0.008, 0.08], **floor},
    }  # fmt: skip


def test_a_file_without_sweeps_says_so_in_one_line(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: not installed")
    text, printed = report(tmp_path, topk(1000, 5.0, 6.0))
    line = "all plots: not drawn: no sweep over n, density, T or B and no training step here"
    assert text.endswith(f"## Plots\n\n- {line}\n")
    assert printed.count("not drawn") == 1


def test_contenders_are_compared_by_their_multiples_of_the_floor(tmp_path):
    """The machine was half as fast while fishfast ran: its time is longer, its multiple is not."""
    rows_of = [figure("masked_grad", "linear", "fishfast", 300.0, times_floor=1.5),
               figure("masked_grad", "linear", "other", 200.0, times_floor=3.0)]  # fmt: skip
    text, _ = report(tmp_path, rows_of)
    assert [row[1:6:2] + row[5:6] for row in rows(text)] == [
        ["**fishfast**", "**300 us**", "", ""], ["other", "200 us", "2.00", "2.00"],
    ]  # fmt: skip


def test_memory_of_the_process_goes_before_the_allocators(tmp_path):
    text, _ = report(tmp_path, [figure("topk_mask", "n", "torch.topk", 5.0, resident_bytes=2**30)])
    assert rows(text)[0][-1] == "1.00 GiB"


@pytest.mark.parametrize(("percent", "said"), [(31.4, True), (2.0, False)])
def test_a_busy_machine_is_told(tmp_path, percent, said):
    text, _ = report(tmp_path, topk(1000, 5.0, 6.0), machine={"others_percent": percent})
    words = "**Other processes, compilers included, took 31 % of the cores: not a quiet machine.**"
    assert (words in text) is said


def test_without_matplotlib_the_tables_stay(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text, printed = report(tmp_path, topk(1000, 5.0, 6.0))
    assert len(rows(text)) == 2
    assert "not drawn: matplotlib is not installed (pip install 'fishfast[plot]')" in text


def test_a_rehearsal_says_so(tmp_path):
    text, _ = report(tmp_path, topk(1000, 5.0, 6.0), machine={"rehearsal": True})
    assert "**REHEARSAL at toy size: shows that everything runs, measures nothing.**" in text


@pytest.mark.parametrize("file", sorted((BENCH / "results").glob("*.json")), ids=lambda f: f.stem)
def test_kept_files_give_tables(file, tmp_path):
    result = CliRunner().invoke(main, [str(file), "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())["benchmarks"]
    assert len(rows((tmp_path / "report.md").read_text())) == len(figures)
    assert {"stage", "case", "contender", "version"} <= figures[0].keys()


def test_a_run_without_a_figure_names_what_has_none(tmp_path):
    late = {"stage": "topk_mask", "case": "n", "contender": "fishfast", "reason": "no time left"}
    failed = {"stage": "fisher", "case": "BERT", "contender": "fishfast", "reason": "is wrong"}
    text, _ = report(tmp_path, [], skipped=[late], failed=[failed])
    assert "No figure.\n\nNot measured:\n\n- 1 cases, no time left: n\n" in text
    assert "No figure.\n\nNo figure: failed:\n\n- fishfast on BERT: is wrong\n" in text


def test_a_file_without_figures_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    result = CliRunner().invoke(main, [str(tmp_path / "x.json")])
    assert result.exit_code == 2
    assert "x.json has no benchmark figures" in result.output
