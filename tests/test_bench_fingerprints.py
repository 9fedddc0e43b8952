"""bench/fingerprints.py: devices that differ are named; the same one agrees with itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def fingerprints(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("fingerprints")


def run(fingerprints: Any, *arguments: str) -> Any:
    return CliRunner().invoke(fingerprints.main, list(arguments))


def close(error: float, same: bool = True) -> dict[str, Any]:
    return {"relative_error": error, "tolerance": 1e-3, "same_bits_twice": same}


def test_a_cpu_agrees_with_itself_and_another_step_is_named(
    fingerprints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(tmp_path / f"{name}.json") for name in ("first", "second", "third")]
    assert run(fingerprints, "run", "cpu", files[0]).output.startswith("cpu: 9 bit patterns")
    run(fingerprints, "run", "cpu", files[1])
    result = run(fingerprints, "compare", *files[:2])
    assert (result.exit_code, result.output) == (0, "cpu, cpu: the same 9 bit patterns\n")
    make, dtype, options = fingerprints._OPTIMIZERS["Adam fp16"]
    changed = (make, dtype, {**options, "weight_decay": 0.1001})
    monkeypatch.setitem(fingerprints._OPTIMIZERS, "Adam fp16", changed)
    run(fingerprints, "run", "cpu", files[2])
    result = run(fingerprints, "compare", *files)
    assert result.exit_code == 1
    assert result.output.startswith("Adam fp16: cpu ")
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"bits": {"mask": "aa", "step": "cd"}}, "step: card cd, cpu bb"),
        ({"bits": {"mask": "aa"}}, "step: card missing, cpu bb"),
        ({"bits": {"mask": "aa", "step": "bb", "new": "ee"}}, "new: card ee, cpu missing"),
        ({"fisher": {"w": close(0.01)}}, "Fisher of w: relative error 1.00e-02 on card, allowed"),
        ({"fisher": {"w": close(float("nan"))}}, "Fisher of w: relative error nan on card"),
        ({"fisher": {"w": close(1e-5, same=False)}}, "Fisher of w: two runs on card differ"),
    ],
    ids=["other bits", "missing", "only there", "inexact", "nan", "not repeatable"],
)
def test_every_kind_of_difference_is_named(
    fingerprints: Any, run: dict[str, Any], words: str
) -> None:
    bits = {"mask": "aa", "step": "bb"}
    card = {"device": "card", "bits": bits, "fisher": {"w": close(1e-6)}}
    cpu = {"device": "cpu", "bits": bits}
    assert fingerprints.differences([cpu, card]) == []
    (found,) = fingerprints.differences([cpu, {**card, **run}])
    assert found.startswith(words)


def test_the_net_has_work_for_every_kernel(
    fingerprints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the card its scores are held against the CPU's; here both are the CPU's."""
    fisher = fingerprints._fisher
    monkeypatch.setattr(fingerprints, "_fisher", lambda device: fisher("cpu"))
    scores = fingerprints._fisher_on_card()
    assert {name: c["relative_error"] for name, c in scores.items()} == dict.fromkeys(scores, 0.0)
    assert all(c["same_bits_twice"] for c in scores.values())
    assert len(scores) == 9
    assert all(float(score.max()) > 0 for score in fisher("cpu").values())
