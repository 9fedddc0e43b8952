"""Runs the benchmarks: machine first, cases in turns, a time budget, and a flat JSON of figures.

The JSON that a run writes is the one that `bench/results` keeps: the machine, one flat entry per
figure, and by name what was skipped and what failed.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from figures import LATE as _LATE
from machine import cpu_seconds, full_size, machine, machine_line

# The order of the files, and their shares of the time, by what each took on two cores: what README
# carries comes first, of that the long ones last, whose overrun others would lack. A file that is
# not here comes last.
_SHARES = {
    "topk_mask": 10, "sparse_adam": 15, "masked_grad": 6, "train_step": 19, "fisher": 38,
    "host": 4, "fisher_kernel": 5, "fisher_sweep": 9, "host_step": 1,
}  # fmt: skip
_STATE = pytest.StashKey["_Run"]()


class _Run:
    """What one run knows beside its figures."""

    def __init__(self) -> None:
        self.budget = _seconds()
        self.start = time.monotonic()
        self.cpu = cpu_seconds()
        self.counts: Counter[str] = Counter()  # file -> cases, in the order in which they run
        self.current = ""
        self.case: Any = None  # the comparison in hand, and whether there was time for it
        self.skipping = False
        self.skipped: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.written = False

    def spent(self, file: str) -> bool:
        """Return whether the file's share is used up; what it leaves, the files after it have."""
        if self.budget is None:
            return False
        files = list(self.counts)
        weights = [_SHARES.get(name, 5) for name in files]
        share = sum(weights[: files.index(file) + 1]) / sum(weights)
        return time.monotonic() - self.start > share * self.budget

    def no_time(self, file: str, case: Any) -> bool:
        """Return whether to skip; a comparison that began goes on until all time is used up."""
        if case != self.case:
            self.case, self.skipping = case, self.spent(file)
        return self.skipping or self.spent(list(self.counts)[-1])

    def say(self, entry: dict[str, Any], outcome: str) -> None:
        """Print a line for a case without a figure, unless the time was up."""
        if not entry["reason"].startswith(_LATE):
            print(f"{entry['contender']}, {entry['case']}: {outcome}: {entry['reason']}")

    def others(self) -> float:
        """Return the percent of the cores' time that other processes took since the start."""
        (busy, own, now), (busy_then, own_then, then) = cpu_seconds(), self.cpu
        cores = os.cpu_count() or 1
        others = (busy - busy_then) - (own - own_then)
        return max(0.0, 100 * others / (cores * max(now - then, 1e-3)))

    def announce(self, file: str) -> None:
        """Say where the run is, once per file."""
        if file != self.current:
            self.current = file
            within = f" of {self.budget:.0f}" if self.budget else ""
            took = f"{time.monotonic() - self.start:.0f}{within} s"
            print(f"\n== {file}: {self.counts[file]} cases; at {took}", flush=True)


def pytest_configure(config: pytest.Config) -> None:
    """Run toy sizes in one thread: waking more costs more than the work."""
    try:
        config.stash[_STATE] = _Run()
        if not full_size():
            torch.set_num_threads(1)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.option.benchmark_quiet = True  # its table is of the round that looks at the memory


def pytest_report_header() -> str:
    """Head the figures with the machine that they belong to."""
    info = machine()
    note = "REHEARSAL at toy size: " if info["rehearsal"] else ""
    return note + machine_line(info)


@pytest.hookimpl(trylast=True)  # counts what -k has left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run what matters most first, and the contenders of one case after each other."""
    cases: dict[Any, int] = {}
    for item in items:
        cases.setdefault(_labels(item)["key"], len(cases))
    files = [*_SHARES, *dict.fromkeys(map(_stage, items))]
    items.sort(key=lambda item: (files.index(_stage(item)), cases[_labels(item)["key"]]))
    state = config.stash[_STATE]
    state.counts = Counter(_stage(item) for item in items)


def pytest_collection_finish() -> None:
    """Leave what imports made to itself: the collector before each memory figure is slow on it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Say where the run is, and skip, by name, what the budget leaves no time for."""
    state = item.config.stash[_STATE]
    state.announce(_stage(item))
    if state.no_time(_stage(item), _labels(item)["key"]):
        pytest.skip(f"{_LATE} of {state.budget:.0f} s (FISHFAST_BENCH_SECONDS)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Keep what has no figure, with the reason."""
    report = yield
    if report.failed or report.skipped:
        state = item.config.stash[_STATE]
        labels = _labels(item)
        entry = {"name": item.name, "stage": _stage(item), "case": labels["case"]}
        entry["contender"] = labels["contender"]
        entry |= harness.skipped_labels.pop(item.nodeid, {})
        entry.setdefault("reason", _reason(report))
        (state.failed if report.failed else state.skipped).append(entry)
        state.say(entry, "FAILED" if report.failed else "skipped")
    return report


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Print no letter before a line of figures; what has none gets a line of its own."""
    if Path(report.nodeid.split("::")[0]).name.startswith("bench_") and (
        report.skipped or report.when == "call"
    ):
        return report.outcome, "", report.outcome.upper()
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many cases the time did not reach, and who else used the machine."""
    state = config.stash[_STATE]
    late = {(e["stage"], e["case"]) for e in state.skipped if e["reason"].startswith(_LATE)}
    if late:
        terminalreporter.line(f"not reached within {state.budget:.0f} s: {len(late)} cases")
    terminalreporter.line(
        f"other processes, compilers included, took {state.others():.0f} % of the cores"
    )


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Leave figures and what they depend on: no host name, no times of the wall clock."""
    state = config.stash[_STATE]
    figures = [_flat(entry) for entry in output_json["benchmarks"]]
    state.written = True
    output_json.clear()
    output_json.update(
        machine={**machine(), "others_percent": round(state.others(), 1)},
        benchmarks=figures,
        skipped=state.skipped,
        failed=state.failed,
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep what was skipped and failed where nothing has a figure: pytest-benchmark wrote none."""
    state, file = session.config.stash[_STATE], session.config.getoption("benchmark_json", None)
    if file is not None and not state.written and (state.skipped or state.failed):
        content: dict[str, Any] = {"benchmarks": []}
        pytest_benchmark_update_json(session.config, content)
        file.write_text(json.dumps(content, indent=4))


def _seconds() -> float | None:
    """Return how long the run may take; None: as long as it takes."""
    given = os.environ.get("FISHFAST_BENCH_SECONDS")
    if not given:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:  # NaN too
        raise ValueError(
            f"FISHFAST_BENCH_SECONDS must be a number of seconds above 0; got {given!r}; "
            "unset it to measure everything"
        )
    return seconds


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """Return one entry of pytest-benchmark as `bench/results` has it."""
    file = entry["fullname"].split("::")[0]
    params = entry["params"] or {}
    contender = str(params.get("contender", "fishfast"))
    labels = {
        "name": entry["name"],
        "stage": file.rsplit("/", 1)[-1].removeprefix("bench_").removesuffix(".py"),
        "case": _words(params),
        "contender": contender,
    }
    labels |= entry["extra_info"]
    ours = labels["contender"].startswith("fishfast")
    info = machine()
    default = f"fishfast {info['fishfast']['version']}" if ours else f"torch {info['torch']}"
    labels.setdefault("version", default)
    return labels


def _stage(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("bench_")


def _labels(item: pytest.Item) -> dict[str, Any]:
    """Return a case's contender, its other parameters, and what its contenders have in common."""
    case = getattr(item, "callspec", None)
    params = dict(case.params) if case is not None else {}
    contender = str(params.pop("contender", "fishfast"))
    others = _words(params)
    key = (_stage(item), getattr(item, "originalname", item.name), others)
    return {"contender": contender, "case": others, "key": key}


def _words(params: dict[str, Any]) -> str:
    """Return what a case is called that has no title: its parameters, numbers with their names."""
    return ", ".join(
        f"{name} {value}" if isinstance(value, (int, float)) else str(value)
        for name, value in params.items()
        if name not in ("contender", "device")
    )


def _reason(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr).splitlines()[0][:300]
