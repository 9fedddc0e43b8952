"""csrc/parallel.h: the same counts on torch's threads, on its own and in a forked child."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from processes import HANG_GUARD

EXTENSION = importlib.util.find_spec("fishfast._C")

# A histogram of 2**20 scores by four threads: 16 chunks. numpy alone, so that torch may be absent.
COUNT = """
import importlib.machinery, importlib.util, sys
import numpy as np

def load(path):
    loader = importlib.machinery.ExtensionFileLoader("fishfast._C", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module

scores = np.random.default_rng(0).random(2**20, dtype=np.float32)
truth = np.bincount(scores.view(np.int32) >> 16, minlength=2**15)

def check(extension):
    passes = extension.TopkPasses([(scores.ctypes.data, scores.size, 0)], 4)
    counts = np.zeros(2**15, np.int64)
    assert passes.histogram(16, 15, 0, counts.ctypes.data) == (-1, -1)
    counts[0] = truth[0]  # zeros are not counted
    assert (counts == truth).all()
"""

WITHOUT_TORCH = """
extension = load(sys.argv[1])
check(extension)
assert "torch" not in sys.modules
"""

FORKED = """
import os, torch
torch.set_num_threads(4)
torch.rand(2**20).exp()  # torch's threads exist
extension = load(sys.argv[1])
child = os.fork()
if child == 0:
    check(extension)
    os._exit(17)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
check(extension)
"""


@pytest.mark.skipif(EXTENSION is None, reason="no compiled extension")
@pytest.mark.parametrize("script", [WITHOUT_TORCH, FORKED], ids=["without torch", "forked"])
def test_chunks_are_counted_once_by_whatever_threads_there_are(script):
    command = [sys.executable, "-c", COUNT + script, EXTENSION.origin]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG_GUARD, check=False)
    assert ran.returncode == 0, ran.stderr
