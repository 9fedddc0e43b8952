"""Which tests run_gpu.sh runs on a card (gpu_tests.py), and what it says of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from processes import HANG_GUARD, let_processes_hear_ctrl_c, wait_for

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from gpu_tests import files, missing  # noqa: E402


def test_marks_and_packages_are_found_through_helpers(tmp_path: Path) -> None:
    sources = {
        "test_direct.py": "import pytest\npytestmark = pytest.mark.gpu\n",
        "test_helped.py": "from rooms.inner import WHERE\nfrom rooms import other\n",
        "test_text.py": "TEXT = 'pytest.mark.gpu'\n",
        "test_cuda.py": "import pytest\nimport nowhere.deep\npytestmark = pytest.mark.gpu\n",
        "rooms/__init__.py": "",
        "rooms/inner.py": "from . import places\nfrom .places import WHERE\nimport torch.nn\n",
        "rooms/places.py": "import pytest\nWHERE = [pytest.param(1, marks=pytest.mark.gpu)]\n",
        "rooms/other.py": "from absent import thing\ndef later():\n    import not_now\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {file.name: missing(file, tmp_path) for file in files(tmp_path)}
    assert list(found.items()) == [
        ("test_cuda.py", ["nowhere"]), ("test_direct.py", []), ("test_helped.py", ["absent"]),
    ]  # fmt: skip


def test_every_file_with_a_mark_is_run_and_the_first_are_there() -> None:
    """The marks of Triton's files are in a helper."""
    names = [file.name for file in files(ROOT / "tests")]
    assert names[:6] == [
        "test_cuda.py", "test_topk_mask_cuda.py", "test_capturable_cuda.py", "test_masked_grad.py",
        "test_masked_grad_roads.py", "test_fisher_cuda.py",
    ]  # fmt: skip
    assert {f"test_fisher_{n}_triton.py" for n in ("conv", "embedding", "linear", "sum")} <= {
        *names
    }
    assert "test_bench_gpu_tests.py" not in names


def test_a_run_cut_short_says_what_it_did_not_reach(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_a.py").write_text(
        "import pathlib, time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_slow():\n    pathlib.Path('here').touch()\n    time.sleep(36000)\n"
    )
    (tmp_path / "test_b.py").write_text("def test_late(): pass\ndef test_later(): pass\n")
    inherited = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    let_processes_hear_ctrl_c()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "bench.tests_outcome", "."],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "here").exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=HANG_GUARD)
    said = "1 passed, 1 failed (test_a.py 1), 3 not reached (test_a.py 1, test_b.py 2)"
    assert f"\nFAILED: {said}\n" in output
