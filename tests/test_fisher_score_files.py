"""Saved scores: everything comes back, and what is not as it was written is refused."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import fishfast as ff
from fishfast.files.safetensors_file import write_atomically

SCORES = {
    "z.weight": torch.rand(3, 5, generator=torch.Generator().manual_seed(0)),
    "a.ünïcode": torch.zeros(2),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5e-38),
}
FACTS = {
    "num_samples": 7,
    "num_batches": 3,
    "fisher_type": "exact",
    "power": 1,
    "fallback": {"scalar": "used by exp"},
    "roads": {"z.weight": "captured", "a.ünïcode": "batched", "empty": "batched",
              "scalar": "used by exp"},
    "passes": {"forward": 3, "backward": 4, "probe": 2, "fallback": 7},
    "seconds": {"forward": 0.1, "backward": 1 / 3, "probe": 0.0, "fallback": 2.0},
}  # fmt: skip


def fisher(**changes):
    return ff.Fisher(**{"scores": SCORES, **FACTS, **changes})


def parts():
    """What `save` hands to the writer."""
    header = {name: json.dumps(value) for name, value in FACTS.items()}
    header |= {"format": "fishfast.fisher", "format_version": "1"}
    return dict(SCORES), signed(header)


def signed(header):
    entries = {name: text for name, text in header.items() if name != "header_sha256"}
    checksum = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    return {**entries, "header_sha256": checksum}


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_everything_comes_back(tmp_path, as_path):
    path = as_path(tmp_path / "fisher.safetensors")
    fisher().save(path)
    loaded = ff.Fisher.load(path)
    assert list(loaded) == list(SCORES)  # the order decides ties
    for name, score in SCORES.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], score)
    assert loaded.facts() == {**FACTS, "seconds": dict.fromkeys(FACTS["seconds"], 0.0)}
    mask = ff.top_k_mask(loaded, k=4)
    assert mask == ff.top_k_mask(fisher(), k=4)


def test_views_of_one_buffer_are_saved(tmp_path):
    buffer = torch.rand(10)
    ff.Fisher({"a": buffer[:4].view(2, 2), "b": buffer[4:], "c": buffer[::2]}, 1).save(
        tmp_path / "f"
    )
    loaded = ff.Fisher.load(tmp_path / "f")
    assert torch.equal(torch.cat([loaded["a"].flatten(), loaded["b"]]), buffer)
    assert torch.equal(loaded["c"], buffer[::2])


def test_equal_results_of_slow_and_fast_runs_are_the_same_file(tmp_path):
    for name, seconds in (("slow", FACTS["seconds"]), ("fast", {}), ("again", {})):
        fisher(seconds=seconds).save(tmp_path / name)
    (content,) = {path.read_bytes() for path in tmp_path.iterdir()}
    assert content.find(b'"fallback"') < content.find(b'"roads"') < content.find(b'"sha256"')


def test_a_file_that_has_seconds_is_good(tmp_path):
    """Of an earlier version of fishfast, or of a run that may go on."""
    write_atomically(tmp_path / "f", *parts())
    assert ff.Fisher.load(tmp_path / "f").facts() == FACTS


BAD_SCORES = [
    (torch.rand(3, 5).double(), "scores must be torch.float32; 'z.weight' is torch.float64"),
    (torch.ones(3, 5).int(), "scores must be torch.float32; 'z.weight' is torch.int32"),
    (torch.full((3, 5), torch.nan), "scores must be finite; 'z.weight' has NaN or infinity"),
    (torch.full((3, 5), torch.inf), "scores must be finite; 'z.weight' has NaN or infinity"),
    (torch.full((3, 5), -1.0), "scores must be at least 0; 'z.weight' has -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("score", "text"), BAD_SCORES)
def test_bad_scores_are_not_saved(tmp_path, score, text):
    with pytest.raises(ValueError, match=f"the scores to be saved: {text}"):
        fisher(scores={**SCORES, "z.weight": score}).save(tmp_path / "f")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("score", "text"), BAD_SCORES)
def test_bad_scores_are_not_loaded(tmp_path, score, text):
    tensors, header = parts()
    write_atomically(tmp_path / "f", {**tensors, "z.weight": score}, header)
    with pytest.raises(ValueError, match=f"/f': {text}"):
        ff.Fisher.load(tmp_path / "f")


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("format", "fishfast.mask", "a fishfast.fisher file; its format is 'fishfast.mask'"),
        ("format_version", "2", "this fishfast reads version 1"),
        ("num_samples", None, "broken header: KeyError"),
        ("num_samples", "-1", "broken header"),
        ("num_samples", "1.0", "broken header"),
        ("num_samples", "true", "broken header"),
        ("num_batches", '"3"', "broken header"),
        ("num_batches", "{", "broken header"),
        ("fisher_type", '"true"', "broken header"),
        ("fisher_type", "[]", "broken header"),
        ("power", "3", "broken header"),
        ("power", "true", "broken header"),
        ("fallback", "[]", "broken header"),
        ("fallback", '{"scalar": 1}', "broken header"),
        ("fallback", '{"none": "why"}', "broken header.*fallback names 'none'"),
        ("roads", '{"scalar": "batched"}', "broken header.*roads and scores must match"),
        ("roads", json.dumps({**FACTS["roads"], "none": "why"}), "broken header.*'none' is in one"),
        ("roads", "[" * 100_000, "broken header"),
        ("passes", "{}", "broken header"),
        ("passes", json.dumps({**FACTS["passes"], "forward": -1}), "broken header"),
        ("seconds", json.dumps({**FACTS["seconds"], "forward": "1"}), "broken header"),
        ("seconds", json.dumps({**FACTS["seconds"], "forward": float("nan")}), "broken header"),
        ("seconds", json.dumps({**FACTS["seconds"], "forward": float("inf")}), "broken header"),
    ],
    ids=lambda value: None if value is None else value[:40],
)  # fmt: skip
def test_bad_headers_are_refused(tmp_path, entry, value, text):
    tensors, header = parts()
    header[entry] = value
    header = signed({n: v for n, v in header.items() if v is not None})
    write_atomically(tmp_path / "f", tensors, header)
    with pytest.raises(ValueError, match=text):
        ff.Fisher.load(tmp_path / "f")


def test_a_power_written_as_a_float_is_a_whole_number(tmp_path):
    tensors, header = parts()
    write_atomically(tmp_path / "f", tensors, signed({**header, "power": "2.0"}))
    assert repr(ff.Fisher.load(tmp_path / "f").power) == "2"


def test_a_missing_tensor_is_noticed(tmp_path):
    tensors, header = parts()
    del tensors["empty"]
    write_atomically(tmp_path / "f", tensors, header)
    with pytest.raises(ValueError, match="'empty' is in one only"):
        ff.Fisher.load(tmp_path / "f")


def test_every_flipped_bit_of_the_scores_is_noticed(tmp_path):
    path = tmp_path / "f"
    fisher().save(path)
    raw = path.read_bytes()
    for place in range(len(raw) - 60, len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(ValueError, match="does not match its checksum: the file is damaged"):
            ff.Fisher.load(path)


def test_every_changed_fact_is_noticed(tmp_path):
    path = tmp_path / "f"
    fisher().save(path)
    raw = path.read_bytes()
    changed = raw.replace(b'"num_samples":"7"', b'"num_samples":"6"')
    assert changed != raw
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="the header does not match its checksum: the file is dam"):
        ff.Fisher.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        ff.Fisher.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="the folder of .* must exist"):
        fisher().save(tmp_path / "none" / "f")
    (tmp_path / "text").write_text("scores")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ff.Fisher.load(tmp_path / "text")
    ff.random_mask(torch.nn.Linear(2, 2), k=1, seed=0).save(tmp_path / "mask")
    with pytest.raises(ValueError, match="must be a fishfast.fisher file"):
        ff.Fisher.load(tmp_path / "mask")
