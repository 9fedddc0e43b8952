"""pytest's plugin that says in a line what a test run came to: ``-p bench.tests_outcome``.

Where not everything passed, run_gpu.sh takes the line for its summary: how many passed, and by file
what failed and what a run that was cut short did not reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["pytest_configure"]


class _Outcome:
    """Which tests there are, and which have ended."""

    def __init__(self) -> None:
        self.collected: dict[str, None] = {}
        self.ended: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected |= dict.fromkeys(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.collected |= dict.fromkeys(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.ended.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the line, unless all is well."""
        stats = terminalreporter.stats
        broken = [report.nodeid for kind in ("failed", "error") for report in stats.get(kind, [])]
        unreached = [test for test in self.collected if test not in self.ended]
        if broken or unreached:
            told = (_by_file(broken, "failed"), _by_file(unreached, "not reached"))
            passed = f"{len(stats.get('passed', []))} passed"
            terminalreporter.line(f"FAILED: {', '.join([passed, *filter(None, told)])}")


def _by_file(tests: Iterable[str], word: str) -> str:
    counts = Counter(test.split("::")[0].rsplit("/", 1)[-1] for test in tests)
    named = ", ".join(f"{file} {count}" for file, count in counts.items())
    return f"{counts.total()} {word} ({named})" if named else ""


def pytest_configure(config: pytest.Config) -> None:
    """Take part where the tests' outcomes come together."""
    if not hasattr(config, "workerinput"):  # one of pytest-xdist's processes
        config.pluginmanager.register(_Outcome())
