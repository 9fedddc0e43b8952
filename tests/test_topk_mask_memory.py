"""A selection on the CPU: beyond the scores and the mask it takes 2 % of the scores at most."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fishfast as ff

# A process of its own: other tests leave memory behind that a selection could use. Both sides of
# the difference are what the system says; libraries that are loaded late must be there before.
PROGRAM = """
import re, sys, torch
import fishfast as ff

n, keep = int(sys.argv[1]), sys.argv[3:]
torch.set_num_threads(2)
def scores_of(n):
    rest = n // 5
    values = torch.arange(n, dtype=torch.int32).mul_(20).view(torch.float32)
    return {"first": values[:rest], "kept": values[rest : 2 * rest], "most": values[2 * rest :]}

ff.top_k_mask(scores_of(10**5), density=0.3, keep=keep)
scores = scores_of(n)
def memory(kind):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(kind + r":\\s+(\\d+)", file.read())[1])

before = memory("VmRSS")
mask = ff.top_k_mask(scores, density=float(sys.argv[2]), keep=keep)
peak = memory("VmHWM")  # ru_maxrss would begin with that of pytest
output = sum(found.nbytes for found in mask.values())
assert output == 4 * mask.num_selected == 4 * int(float(sys.argv[2]) * n)
print(peak - before - output)
"""


@pytest.mark.parametrize(
    ("density", "keep"), [(0.005, []), (0.5, ["kept"])], ids=["sparse", "half-with-a-kept-part"]
)
@pytest.mark.parametrize(
    "n", [10**8, pytest.param(10**9, marks=pytest.mark.large)], ids=["1e8", "1e9"]
)
def test_memory_beyond_scores_and_mask(n, density, keep):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(n), str(density), *keep],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 0.02 * 4 * n


def test_a_mask_of_a_selection_is_not_copied():
    """All indices of one width are slices of one buffer, as the selection wrote them."""
    scores = {f"t{i}": torch.rand(100 + i) for i in range(5)}
    mask = ff.top_k_mask(scores, density=0.5)
    assert len({found.untyped_storage().data_ptr() for found in mask.values()}) == 1


@pytest.mark.parametrize("keep", [(), "t2"])
def test_masks_share_nothing_with_each_other(keep):
    scores = {f"t{i}": torch.rand(100 + i) for i in range(5)}
    masks = ff.split_mask(scores, density=0.3, num_workers=2, keep=keep)
    masks += [ff.top_k_mask(scores, density=0.3, keep=keep) for _ in range(2)]
    storages = [{found.untyped_storage().data_ptr() for found in m.values()} for m in masks]
    assert len(set.union(*storages)) == sum(len(own) for own in storages)


def test_a_mask_of_a_selection_is_saved_and_equals_one_of_copied_indices(tmp_path):
    scores = {"a": torch.rand(50), "none": torch.zeros(7), "out": torch.rand(3), "b": torch.rand(9)}
    mask = ff.top_k_mask(scores, k=20, keep="b", exclude="out")
    mask.save(tmp_path / "mask.safetensors")
    for other in (
        ff.SparseMask.load(tmp_path / "mask.safetensors"),
        ff.SparseMask(mask, mask.shapes, mask.num_zero_score),
    ):
        assert other == mask
        assert other.shapes == mask.shapes
        assert other.num_zero_score == mask.num_zero_score
        assert [found.dtype for found in other.values()] == [torch.int32] * 4
