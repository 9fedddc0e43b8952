"""``pytest -m gpu --simulated-card``: installs the card, leaves out what cannot run, counts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from simt.build import compiler

from simulated_card.cannot_run import why_not

HERE = Path(__file__).resolve().parent
_NAME = "simulated_card_device"


def build_device(folder: Path) -> None:
    """Compile device.cpp against the torch that is installed.

    Args:
        folder: where to.
    """
    home = Path(torch.__file__).parent
    include, library = home / "include", home / "lib"
    command = [
        compiler(), "-O1", "-std=c++20", "-shared", "-fPIC", str(HERE / "device.cpp"),
        "-o", str(folder / f"{_NAME}.so"), f"-DTORCH_EXTENSION_NAME={_NAME}",
        f"-I{include}", f"-I{include / 'torch/csrc/api/include'}",
        f"-I{sysconfig.get_paths()['include']}", f"-L{library}", f"-Wl,-rpath,{library}",
        "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load_device(folder: Path) -> Any:
    """Load what `build_device` made.

    Args:
        folder: of it.
    """
    spec = importlib.util.spec_from_file_location(_NAME, folder / f"{_NAME}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SimulatedCard:
    """The plugin. One process compiles; the workers of pytest-xdist load what it made.

    Args:
        config: of this process.
    """

    def __init__(self, config: pytest.Config) -> None:
        if torch.version.cuda is not None:
            raise pytest.UsageError("--simulated-card needs a torch without CUDA")
        os.environ["TRITON_INTERPRET"] = "1"
        worker = getattr(config, "workerinput", None)
        if worker is None:
            made = tempfile.TemporaryDirectory(prefix="simulated-card-")
            config.add_cleanup(made.cleanup)
            self.folder = Path(made.name)
            self._build()
        else:
            self.folder = Path(worker["simulated_card"])
        self._install()

    def _build(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        from simulated_card.extension import build_kernels

        with ThreadPoolExecutor() as pool:
            for job in [pool.submit(f, self.folder) for f in (build_device, build_kernels)]:
                job.result()

    def _install(self) -> None:
        from triton_cpu import interpreter_bf16

        from simulated_card import extension, torch_cuda

        torch.set_num_threads(1)
        self.card = load_device(self.folder)
        torch_cuda.install(self.card)
        extension.install(self.folder)
        interpreter_bf16.install()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker where the compiled files are."""
        node.workerinput["simulated_card"] = str(self.folder)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark what needs a real card, with the reason."""
        for item in items:
            if reason := why_not(item.nodeid):
                item.add_marker(pytest.mark.skipif(True, reason=reason))

    @pytest.fixture
    def simulated_card(self) -> Any:
        """The module of device.cpp, which counts operators and waits."""
        return self.card

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Say how many ran; fail where fewer than were asked for did."""
        config = session.config
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if hasattr(config, "workerinput") or reporter is None:
            return
        passed, least = len(reporter.stats.get("passed", [])), config.option.card_least
        reporter.write_line(f"\nsimulated card: {passed:,} tests passed, at least {least:,} must")
        if passed < least:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
