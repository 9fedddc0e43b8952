"""Shared set-up: says what is under test, and what is left out (not_run.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from not_run import (  # noqa: F401  hooks
    pytest_collection_modifyitems,
    pytest_configure_node,
    pytest_report_collectionfinish,
    pytest_sessionfinish,
    pytest_xdist_node_collection_finished,
)
from simt.build import build
from simt.library import SimtLibrary

import fishfast as ff

if TYPE_CHECKING:
    from simt.sparse_step_backend import SimulatedExtension

# Convolutions, too, in fp32 as on the CPU: on a card torch takes tf32 for them unless told.
torch.backends.cudnn.allow_tf32 = False

# The modules that assert for tests: their failures show the values too.
pytest.register_assert_rewrite(
    "batch_1_loop",
    "capturable_runs",
    "cuda_models",
    "fisher_checks",
    "processes",
    "stepping",
    "train_only_modules",
    "train_only_net",
    "twins",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the simulated card."""
    parser.addoption(
        "--simulated-card",
        action="store_true",
        help="run the tests marked gpu on a card that is not there (tests/simulated_card)",
    )
    parser.addoption(
        "--card-least", type=int, default=1, help="with it: so many tests at least must pass"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Install the card before a test file asks for one."""
    if config.option.simulated_card:
        from simulated_card.plugin import SimulatedCard

        config.pluginmanager.register(SimulatedCard(config))


def pytest_report_header() -> list[str]:
    """Name the files and backends under test, so that a log tells what ran."""
    info = ff.build_info()
    return [
        f"fishfast {info['version']} from {os.path.dirname(ff.__file__)}",
        f"extension {info['extension']} (nvcc {info['nvcc']}), torch {info['torch']}",
        f"unavailable {info['unavailable']}",
    ]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- for test_topk_mask*.py ---


@pytest.fixture(scope="session")
def topk_library(tmp_path_factory: pytest.TempPathFactory) -> SimtLibrary:
    """csrc/topk_mask.cu, executed on the CPU."""
    from simt.topk_mask_backend import SOURCES  # not above: imports the package under test

    return SimtLibrary(build(SOURCES, tmp_path_factory.mktemp("simt") / "topk_mask.so"))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, topk_library: SimtLibrary) -> None:
    """Let ``backend="simulated"`` run the CUDA kernels, and the Python above, on CPU tensors."""
    from simt.topk_mask_backend import SimulatedTopk, install

    topk_library.schedule(seed=0)
    install(monkeypatch, SimulatedTopk(topk_library))


@pytest.fixture(autouse=True)
def _simulated_where_asked_for(request: pytest.FixtureRequest) -> None:
    case = getattr(request.node, "callspec", None)
    if case is not None and case.params.get("backend") == "simulated":
        request.getfixturevalue("simulated")


# --- for test_sparse_optimizer_simt.py and test_capturable_*.py ---


@pytest.fixture(scope="session")
def step_library(tmp_path_factory: pytest.TempPathFactory) -> SimtLibrary:
    """csrc/sparse_adam.cu and csrc/sparse_sgd.cu, executed on the CPU."""
    from simt.sparse_step_backend import SOURCES

    return SimtLibrary(build(SOURCES, tmp_path_factory.mktemp("simt") / "steps.so"))


@pytest.fixture
def simulated_steps(
    monkeypatch: pytest.MonkeyPatch, step_library: SimtLibrary
) -> SimulatedExtension:
    """Let ``backend="simulated"`` of the optimizers run them on CPU tensors."""
    from simt.sparse_step_backend import install

    step_library.schedule(seed=0)
    return install(monkeypatch, step_library)


# --- for test_delta_*.py ---


@pytest.fixture(scope="module")
def tuned() -> ff.SparseTuning:
    from delta_net import trained  # not above: stepping is to be rewritten first

    torch.manual_seed(0)
    return trained()


@pytest.fixture
def path(tuned: ff.SparseTuning, tmp_path: Path) -> Path:
    ff.save_delta(tuned, tmp_path / "task.safetensors")
    return tmp_path / "task.safetensors"


# --- for test_checkpoint_*.py ---


@pytest.fixture
def pieces_of_40_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read stored tensors 40 bytes at a time."""
    from fishfast.files import stored_tensors

    monkeypatch.setattr(stored_tensors, "_PIECE_BYTES", 40)
