"""`open_scores`: scores in a file are selected like those in memory, a few megabytes at a time."""

from __future__ import annotations

import json

import pytest
import torch
from cases import VALUES
from safetensors.torch import save_file

import fishfast as ff
from fishfast.files.stored_tensors import StoredTensor
from fishfast.mask.selection import batches

BACKENDS = ["cpu", "torch"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.safetensors"


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut into pieces of 100 scores, and note what is read."""
    monkeypatch.setattr(batches, "_COPIED_ELEMENTS", 100)
    reads, read_into = [], StoredTensor.read_into

    def noting(self, flat, start):
        reads.append(len(flat))
        read_into(self, flat, start)

    monkeypatch.setattr(StoredTensor, "read_into", noting)
    return reads


def model_scores(make, dtype=torch.float32):
    shapes = {"z": (7, 30), "a": (1, 1009), "empty": (0, 4), "scalar": (), "m": (3, 5, 10)}
    return {name: make(torch.Size(s).numel()).view(s).to(dtype) for name, s in shapes.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", VALUES)
def test_the_mask_is_that_of_scores_in_memory(make, backend, path, small_pieces):
    scores = model_scores(make)
    save_file(scores, path)
    stored = ff.open_scores(path)
    scores = {name: scores[name] for name in stored}
    n = sum(score.numel() for score in scores.values())
    for rules in (
        {"k": 1}, {"k": 7}, {"density": 0.3}, {"k": n}, {"density": 0.2, "scope": "layer"},
        {"k": 400, "keep": "z", "exclude": "m"},
    ):  # fmt: skip
        mask = ff.top_k_mask(stored, **rules, backend=backend)
        expected = ff.top_k_mask(scores, **rules, backend=backend)
        assert mask == expected
        assert mask.num_zero_score == expected.num_zero_score
        assert list(mask) == list(expected)
    split = {"k": 60, "num_workers": 3, "keep": "scalar", "backend": backend}
    assert ff.split_mask(stored, **split) == ff.split_mask(scores, **split)
    assert max(small_pieces) == 100  # of 1009 in one row


def test_scores_are_read_three_times(path, small_pieces):
    scores = model_scores(VALUES[0].values[0])
    save_file(scores, path)
    ff.top_k_mask(ff.open_scores(path), k=50)
    assert sum(small_pieces) == 3 * sum(score.numel() for score in scores.values())
    small_pieces.clear()
    save_file({name: score.bfloat16() for name, score in scores.items()}, path)
    ff.top_k_mask(ff.open_scores(path), k=50)
    assert sum(small_pieces) == 2 * sum(score.numel() for score in scores.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_mixed_with_tensors(dtype, backend, path, small_pieces):
    scores = model_scores(VALUES[1].values[0], dtype)
    save_file(scores, path)
    stored = ff.open_scores(path)
    scores = {name: scores[name] for name in stored}
    more = {"more": torch.randint(0, 5, (30, 20)).float().T, "last": torch.rand(50)}
    mask = ff.top_k_mask({**stored, **more}, density=0.3, backend=backend)
    assert mask == ff.top_k_mask({**scores, **more}, density=0.3, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_of_tensors_that_are_not_contiguous(backend, small_pieces):
    whole = torch.randint(0, 40, (23, 31, 17)).float()
    views = {
        "permuted": whole.permute(2, 0, 1), "strided": whole[::2, :, ::3], "column": whole[:, 3, 3],
        "expanded": whole[0, 0].expand(40, -1), "wide": whole.view(23, -1).T[3:4],
    }  # fmt: skip
    copies = {name: view.contiguous() for name, view in views.items()}
    for k in (1, 50, 3000, 5000):
        assert ff.top_k_mask(views, k=k, backend=backend) == ff.top_k_mask(copies, k=k)


def test_a_fisher_file_has_the_order_of_its_scores(path):
    """All ties: the order decides; safetensors puts the larger dtype, then the name, first."""
    scores = {name: torch.full((4,), 2.0) for name in ("z", "b", "a")}
    ff.Fisher(scores, num_samples=3).save(path)
    stored = ff.open_scores(path)
    assert list(stored) == ["z", "b", "a"]
    assert repr(stored).endswith("12 weights in 3 tensors)")
    mask = ff.top_k_mask(stored, k=5)
    assert mask == ff.top_k_mask(ff.Fisher.load(path), k=5)
    assert [len(found) for found in mask.values()] == [4, 1, 0]


@pytest.mark.parametrize("stored", [True, False], ids=["file", "transposed"])
def test_memory_is_bounded(stored, path):
    """Of 128 MB that have to be copied, 4 MB at a time are in memory; half a MB per histogram."""
    n = 2**25
    scores = {"w": torch.arange(n, dtype=torch.int32).view(torch.float32).view(1, n)}
    if stored:
        save_file(scores, path)
        scores = ff.open_scores(path)
    else:
        scores["w"] = scores["w"].view(2, n // 2).T
    ff.top_k_mask(scores, k=1)  # torch's first calls load what they need
    _, current = memory_of_this_process(reset=True)
    mask = ff.top_k_mask(scores, density=0.001)
    growth = memory_of_this_process()[0] - current
    k = n // 1000
    assert mask.num_selected == k
    expected = range(n - k, n)
    if not stored:
        expected = [2 * (i - n // 2) + 1 for i in expected]
    assert mask["w"].tolist() == list(expected)
    assert growth < 12 * 2**20


def memory_of_this_process(reset=False):
    """Peak and current resident bytes; the peak is since the last reset."""
    if reset:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            pytest.skip("this kernel does not let a process reset its peak memory")
    with open("/proc/self/status") as file:
        fields = dict(line.split(":") for line in file)
    return tuple(1024 * int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_scores_are_refused_by_their_place_in_the_tensor(backend, path, small_pieces):
    scores = model_scores(VALUES[0].values[0])
    scores["a"][0, 777] = scores["a"][0, 900] = torch.nan
    save_file(scores, path)
    for rules in ({}, {"exclude": "a"}):
        with pytest.raises(ValueError, match="got nan at flat index 777 of 'a'"):
            ff.top_k_mask(ff.open_scores(path), k=9, **rules, backend=backend)


def test_files_that_are_refused(path):
    with pytest.raises(FileNotFoundError):
        ff.open_scores(path)
    path.write_bytes(b"no scores")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        ff.open_scores(path)
    save_file({"w": torch.rand(3).double()}, path)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16; 'w' is torch.float64"):
        ff.open_scores(path)
    save_file({"w": torch.rand(300)}, path)
    stored = ff.open_scores(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        ff.open_scores(path)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        ff.top_k_mask(stored, k=1)


@pytest.mark.parametrize("roads", ["{}", "[1", None, '{"w": "batched", "more": "batched"}'])
def test_broken_fisher_headers_are_refused(roads, path):
    metadata = {"format": "fishfast.fisher", **({} if roads is None else {"roads": roads})}
    save_file({"w": torch.rand(3)}, path, metadata)
    with pytest.raises(ValueError, match="has a broken header"):
        ff.open_scores(path)


def test_a_header_that_names_a_tensor_twice_is_refused(path):
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    header = f'{{"w": {entry}, "w": {entry}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="names a tensor twice|not a whole safetensors"):
        ff.open_scores(path)


def test_a_file_is_the_one_that_was_opened(tmp_path, monkeypatch):
    for folder, scores in (("here", [1.0, 4.0, 2.0]), ("there", [4.0, 1.0, 2.0])):
        (tmp_path / folder).mkdir()
        save_file({"w": torch.tensor(scores)}, tmp_path / folder / "scores.safetensors")
    monkeypatch.chdir(tmp_path / "here")
    opened = ff.open_scores("scores.safetensors")
    monkeypatch.chdir(tmp_path / "there")
    assert ff.top_k_mask(opened, k=1)["w"].tolist() == [1]
    save_file({"w": torch.tensor([1.0, 2.0, 4.0])}, tmp_path / "here" / "scores.safetensors")
    with pytest.raises(ValueError, match="has changed since it was opened; open it again"):
        ff.top_k_mask(opened, k=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_default_dtype_changes_nothing(path, dtype, backend):
    scores = {"w": torch.rand(40, 50), "t": torch.rand(30, 20).T}
    expected = ff.top_k_mask(scores, k=300)
    save_file({name: score.contiguous() for name, score in scores.items()}, path)
    torch.set_default_dtype(dtype)
    try:
        assert ff.top_k_mask(scores, k=300, backend=backend) == expected
        stored = ff.open_scores(path)
        in_order = {name: stored[name] for name in scores}
        assert ff.top_k_mask(in_order, k=300, backend=backend) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_default_device_changes_nothing(backend):
    scores = {"w": torch.rand(40, 50), "t": torch.rand(30, 20).T, "head": torch.rand(3)}
    expected = ff.top_k_mask(scores, k=300, keep="head")
    with torch.device("meta"):
        assert ff.top_k_mask(scores, k=300, keep="head", backend=backend) == expected
        ff.split_mask(scores, k=30, num_workers=3, backend=backend)
