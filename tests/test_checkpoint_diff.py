"""Two checkpoints on disk and the delta between them: bit for bit, and in little memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import Tensors, assert_same_file, checkpoint_of, metadata_of, raw
from delta_net import Net, train, trained
from safetensors.torch import load_file, save_file
from stepping import assert_state, state_of
from torch import nn

import fishfast as ff


@pytest.fixture(autouse=True)
def _small_pieces(pieces_of_40_bytes: None) -> None:
    """Every tensor of more than 40 bytes takes several pieces, the last one not whole."""


def some_tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.10.weight": torch.randn(7, 5, generator=generator),
        "b.2.weight": torch.randn(3, 11, generator=generator).bfloat16(),
        "half": torch.randn(23, generator=generator).half(),
        "double": torch.randn(9, generator=generator).double(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "steps": torch.tensor(5),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(30).view(5, 6),
        "eight": torch.randn(12, generator=generator).to(torch.float8_e4m3fn),
        "norm.running_mean": torch.zeros(6),
    }


def changed_bits(base: Tensors) -> Tensors:
    """Change some of everything, and only by bits that comparison of numbers overlooks."""
    tuned = {name: t.clone() for name, t in base.items()}
    tuned["b.10.weight"].view(-1)[[0, 9, 10, 34]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    tuned["b.2.weight"].view(-1)[[19, 20]] += 1
    tuned["half"][22] = 7
    tuned["double"][0] = torch.nextafter(base["double"][0], torch.tensor(9.0).double())
    tuned["scalar"].fill_(-0.0)
    tuned["flags"][1] = True
    tuned["norm.running_mean"][2] = -0.0
    return tuned


CASES: dict[str, Callable[[Tensors], Tensors]] = {
    "nothing": lambda base: {name: t.clone() for name, t in base.items()},
    "some of everything": changed_bits,
    "all": lambda base: some_tensors(1),
}


@pytest.mark.parametrize("name", CASES)
def test_base_and_diff_give_tuned_again_bit_for_bit(name: str, tmp_path: Path) -> None:
    base = some_tensors()
    tuned = CASES[name](base)
    save_file(base, tmp_path / "base", {"format": "pt", "note": "ä"})
    save_file(tuned, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", allow_large=True)
    delta.save(tmp_path / "delta")
    done = ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert_same_file(tmp_path / "out", tuned)
    assert metadata_of(tmp_path / "out") == {"format": "pt", "note": "ä"}
    assert (done.num_tensors, done.num_selected) == (len(base), delta.num_selected)
    assert done.nbytes == sum(t.nbytes for t in base.values())
    assert not done.created
    assert not done.unknown


def test_diff_has_every_changed_entry_and_no_other(tmp_path: Path) -> None:
    base = some_tensors()
    tuned = changed_bits(base)
    save_file(base, tmp_path / "base")
    save_file(tuned, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")
    for name in ("b.10.weight", "b.2.weight", "half", "double", "scalar"):
        was, now = (np.frombuffer(raw(t[name]), np.uint8) for t in (base, tuned))
        differs = (was != now).reshape(base[name].numel(), -1).any(axis=1)
        assert delta.mask[name].tolist() == np.flatnonzero(differs).tolist(), name
    assert list(delta.mask)[:2] == ["b.2.weight", "b.10.weight"]  # 2 comes before 10
    assert set(delta.buffers) == {"flags", "norm.running_mean"}
    assert set(delta.base_others) == {"eight", "flags", "ids", "norm.running_mean", "steps"}
    assert delta.mask.num_params == 35 + 33 + 23 + 9 + 1


def test_nan_of_other_bits_is_seen_and_refused_and_equal_nan_is_none(tmp_path: Path) -> None:
    bits = torch.zeros(100, dtype=torch.int32)
    bits[3] = 0x7FC00000
    save_file({"w": bits.view(torch.float32)}, tmp_path / "base")
    bits[50] = 1
    save_file({"w": bits.view(torch.float32)}, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")
    assert delta.mask["w"].tolist() == [50]
    bits[3] += 1  # another payload
    save_file({"w": bits.view(torch.float32)}, tmp_path / "tuned")
    with pytest.raises(ValueError, match="values must be finite; 'w' in '.*tuned' has NaN"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")
    bits[3] = 0  # from NaN to a number
    save_file({"w": bits.view(torch.float32)}, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")
    delta.save(tmp_path / "delta")
    ff.apply_to_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert_same_file(tmp_path / "out", load_file(tmp_path / "tuned"))


def test_buffer_of_eight_bit_floats_that_is_nan_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3).to(torch.float8_e5m2)}, tmp_path / "base")
    save_file({"w": torch.full((3,), torch.nan).to(torch.float8_e5m2)}, tmp_path / "tuned")
    with pytest.raises(ValueError, match="values must be finite; 'w'"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")


def test_named_buffers_are_replaced_whole(tmp_path: Path) -> None:
    base = {"ema.shadow": torch.zeros(50), "w": torch.zeros(50)}
    save_file(base, tmp_path / "base")
    base["ema.shadow"][4] = 1
    save_file(base, tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", buffers="ema")
    assert list(delta.buffers) == ["ema.shadow"]
    assert list(delta.mask) == ["w"]
    with pytest.raises(ValueError, match="buffers entry 'emma' matches no parameter"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", buffers="emma")


LAYOUTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "more": (lambda t: t.update(z=torch.zeros(1)), r"only '.*tuned' has 'z'$"),
    "fewer": (lambda t: t.pop("ids"), r"only '.*base' has 'ids'$"),
    "other names": (
        lambda t: [t.update({f"x.{name}": t.pop(name)}) for name in list(t)],
        "only '.*base' has 'b.2.weight', 'b.10.weight', 'double' and 8 more; only '.*tuned' has "
        "'x.b.2.weight', 'x.b.10.weight', 'x.double' and 8 more$",
    ),
    "shape": (
        lambda t: t.update(half=torch.zeros(1, 23).half()),
        r"'half' is torch.float16 of shape \(23,\) in the base and torch.float16 of shape \(1, 23",
    ),
    "dtype": (
        lambda t: t.update(half=torch.zeros(23)),
        "'half' is torch.float16 .* and torch.float32 ",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_diff_of_other_names_shapes_or_dtypes_is_refused(name: str, tmp_path: Path) -> None:
    change, message = LAYOUTS[name]
    save_file(some_tensors(), tmp_path / "base")
    tuned = some_tensors()
    change(tuned)
    save_file(tuned, tmp_path / "tuned")
    with pytest.raises(ValueError, match=f"must have the same names, shapes and dtypes; {message}"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")


def test_a_delta_larger_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(100)}, tmp_path / "base")
    changed = {"w": (torch.arange(100) < 50).float()}
    save_file(changed, tmp_path / "tuned")
    assert ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned").num_selected == 50
    changed["w"][50] = 1
    save_file(changed, tmp_path / "tuned")
    message = "must be smaller than '.*tuned', which has 400 bytes; it has more already at 'w'"
    with pytest.raises(ValueError, match=message):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned")


def test_diff_goes_on_a_model_and_off(tmp_path: Path) -> None:
    save_file(checkpoint_of(Net()), tmp_path / "base")
    tuned = trained()
    save_file(checkpoint_of(tuned.release()), tmp_path / "tuned")
    ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", allow_large=True).save(
        tmp_path / "delta"
    )
    delta, model = ff.load_delta(tmp_path / "delta"), Net()
    delta.apply_(model)
    assert_state(model, state_of(tuned.model))
    delta.revert_(model)
    assert_state(model, state_of(Net()))


def test_a_float_buffer_that_did_not_change_may_be_taken_for_a_parameter(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(40, 3)
        model.register_buffer("frequencies", torch.arange(5.0))
        return model

    model = make()
    save_file(model.state_dict(), tmp_path / "base")
    with torch.no_grad():
        model.weight[0, 0] += 1
    save_file(model.state_dict(), tmp_path / "tuned")
    other = make()
    ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned").apply_(other)
    assert_state(other, state_of(model))
    model.frequencies[0] = 9
    save_file(model.state_dict(), tmp_path / "tuned")
    with pytest.raises(ValueError, match="it names 'frequencies', which the model does not have"):
        ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned").apply_(make())
    other = make()
    ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", buffers="frequencies").apply_(other)
    assert_state(other, state_of(model))


def test_training_a_delta_from_a_diff(tmp_path: Path) -> None:
    """Its mask is one to train with."""
    save_file(checkpoint_of(Net()), tmp_path / "base")
    save_file(checkpoint_of(trained().release()), tmp_path / "tuned")
    delta = ff.diff_checkpoints(tmp_path / "base", tmp_path / "tuned", allow_large=True)
    model = Net()
    tuned = ff.train_only(model, delta.mask)
    train(tuned, 1)
    assert tuned.num_selected == delta.num_selected


PROGRAM = """
import re, sys
from fishfast import apply_to_checkpoint, diff_checkpoints

def memory(kind):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(kind + r":\\s+(\\d+)", file.read())[1])

small, base, tuned, delta, out = sys.argv[1:]
diff_checkpoints(small, small).save(delta)  # what is loaded late is there
apply_to_checkpoint(small, delta, out)
before = memory("VmRSS")
diff_checkpoints(base, tuned).save(delta)
apply_to_checkpoint(base, delta, out)
print(memory("VmHWM") - before)
"""


def test_peak_memory_is_some_pieces(tmp_path: Path) -> None:
    """A checkpoint of 72 MB, one tensor of 64: far from either in memory."""
    base = {"large": torch.arange(16_000_000, dtype=torch.int32).view(torch.float32),
            "more": torch.ones(2_000_000)}  # fmt: skip
    save_file({"w": torch.zeros(1000)}, tmp_path / "small")
    save_file(base, tmp_path / "base")
    base["large"][::500] += 1
    base["more"][-1] = 0
    save_file(base, tmp_path / "tuned")
    paths = [str(tmp_path / name) for name in ("small", "base", "tuned", "delta", "out")]
    result = subprocess.run([sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 40e6
    assert (tmp_path / "out").read_bytes() == (tmp_path / "tuned").read_bytes()
