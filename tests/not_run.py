"""What a run leaves out, and why: told before its first test, in a line for each reason.

A test that cannot run here, or that runs only when it is asked for, is deselected where it is
collected, and counted at the end. With pytest-xdist that is in the workers, which all collect the
same: the first to have done so tells it through a file.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Marks of tests that run only where ``-m`` names them.
ON_REQUEST = {
    "large": "take gigabytes of memory (pytest -m large)",
    "long": "exhaustive (make test-long)",
}
NO_GPU = "no CUDA device on this machine"

_COUNTS = pytest.StashKey["Counter[str]"]()
_FILE = pytest.StashKey[Path]()


def why_not(item: pytest.Item, asked: str) -> str:
    """Return the reason why a test is left out; empty where it runs.

    Args:
        item: the test.
        asked: the run's ``-m``.
    """
    if item.get_closest_marker("gpu") and not _has_gpu():
        return NO_GPU
    for mark in item.iter_markers("skipif"):
        if mark.args[0]:
            return str(mark.kwargs["reason"])
    for name, reason in ON_REQUEST.items():
        if item.get_closest_marker(name) and name not in asked:
            return reason
    return ""


@functools.cache
def _has_gpu() -> bool:
    import torch  # takes seconds

    return torch.cuda.is_available()


def lines(counts: Counter[str]) -> list[str]:
    """Return what is told before the first test."""
    return [f"not run: {count:,} tests: {reason}" for reason, count in counts.most_common()]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out; after ``-m`` and ``-k``, so that what nobody asked for is not counted."""
    reasons = [why_not(item, config.option.markexpr) for item in items]
    left_out = [item for item, reason in zip(items, reasons, strict=True) if reason]
    counts = Counter(filter(None, reasons))
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]
    config.stash[_COUNTS] = counts
    worker = getattr(config, "workerinput", {})
    if worker.get("workerid") == "gw0":
        Path(worker["not_run"]).write_text(json.dumps(counts))
    elif not worker and left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Tell it, in a run of one process."""
    return lines(config.stash.get(_COUNTS, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give the workers of pytest-xdist the file."""
    if _FILE not in node.config.stash:
        folder = tempfile.TemporaryDirectory(prefix="not-run-")
        node.config.add_cleanup(folder.cleanup)
        node.config.stash[_FILE] = Path(folder.name) / "counts.json"
    node.workerinput["not_run"] = str(node.config.stash[_FILE])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any) -> None:
    """Tell it, before any worker gets a test."""
    file = node.config.stash[_FILE]
    if node.gateway.id != "gw0" or not file.exists():
        return
    counts = Counter(json.loads(file.read_text()))
    reporter = node.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.ensure_newline()
        for line in lines(counts):
            reporter.write_line(line)
        # The last line has them, as in a run of one process.
        node.config.hook.pytest_deselected(items=[SimpleNamespace()] * counts.total())


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail where no test ran: one that was skipped has shown nothing."""
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput") or config.option.collectonly:
        return
    if exitstatus == pytest.ExitCode.OK and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
