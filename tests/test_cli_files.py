"""``fishfast inspect``, ``apply``, ``diff`` and ``info``: what they print, draw and refuse."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from delta_damage import edit_metadata, set_value, signed, truncate
from delta_net import Net
from safetensors.torch import load_file, save_file

import fishfast as ff
from fishfast.cli import main
from fishfast.files import stored_tensors


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output + str(result.exception)
    assert result.stderr == ""
    return result.stdout


def failed(result: Result) -> str:
    """The error: one line, no traceback, exit code 1, nothing on stdout."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def cells(output: str, name: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if line.split()[:1] == [name]]
    return line.split()[1:]


@pytest.fixture
def mask_path(tmp_path: Path) -> Path:
    scores = {
        "z.weight": torch.arange(2000.0).view(50, 40),
        "z.bias": torch.zeros(40),
        "a.weight": torch.full((10, 10), 1999.5),
        "scalar": torch.tensor(0.5),
    }
    ff.top_k_mask(scores, k=300).save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


@pytest.fixture
def score_path(tmp_path: Path) -> Path:
    scores = {"z.weight": torch.tensor([[1.0, 3.0], [0.0, 8.0]]), "a.bias": torch.zeros(3)}
    ff.Fisher(
        scores, num_samples=4, num_batches=2, fisher_type="exact", fallback={"a.bias": "PReLU"}
    ).save(tmp_path / "scores.safetensors")
    return tmp_path / "scores.safetensors"


# --- inspect ---


def test_a_mask_layer_by_layer(mask_path: Path) -> None:
    output = succeeded(run("inspect", mask_path))
    mask = ff.SparseMask.load(mask_path)
    assert "300 of 2,141 (14.01 %) in 2 of 4 tensors" in output
    assert mask.fingerprint in output
    assert f"{mask_path.stat().st_size:,} bytes" in output
    assert cells(output, "z.weight") == ["50x40", "200", "10.000"]
    assert cells(output, "z.bias") == ["40", "0", "0.000"]
    assert cells(output, "a.weight") == ["10x10", "100", "100.000"]
    assert cells(output, "scalar") == ["scalar", "0", "0.000"]
    table = output.splitlines()[output.splitlines().index("") + 3 :]
    assert [line.split()[0] for line in table] == ["z.weight", "z.bias", "a.weight", "scalar"]
    assert len({len(line) for line in table}) == 1  # aligned


def test_top_shows_the_densest_first(mask_path: Path) -> None:
    output = succeeded(run("inspect", mask_path, "--top", 2))
    names = [line.split()[0] for line in output.splitlines()[-2:]]
    assert names == ["a.weight", "z.weight"]
    assert "z.bias" not in output


def test_a_delta_with_its_base_and_size(path: Path, tuned: ff.SparseTuning) -> None:
    output = succeeded(run("inspect", path))
    delta = ff.load_delta(path)
    dense = sum(4 * p.numel() for p in Net().parameters())
    share = 100 * path.stat().st_size / dense
    assert f"{share:.3g} % of the {dense:,} bytes of all weights" in output
    for text in (delta.base_structure, delta.base_content, delta.mask.fingerprint):
        assert text in output
    assert cells(output, "dtypes") == ["float32"]
    assert cells(output, "buffers") == ["3"]
    assert cells(output, "head.weight") == ["2x6", "12", "100.000", "float32"]


def test_a_delta_of_two_dtypes(tmp_path: Path) -> None:
    delta = ff.Delta(
        ff.SparseMask(
            {"half": torch.tensor([0]), "full": torch.tensor([1])},
            {"half": (100,), "full": (10,), "none": (1000,)},
        ),
        {"half": torch.ones(1).bfloat16(), "full": torch.ones(1)}, {}, "s", "c",
    )  # fmt: skip
    delta.save(tmp_path / "d")
    found = ff.inspect_file(tmp_path / "d")
    assert found.facts["dtypes"] == ["bfloat16", "float32"]
    assert found.facts["dense_bytes"] == 100 * 2 + 10 * 4 + 1000 * 2


@pytest.mark.parametrize("piece", [4, 1 << 22])
def test_scores(piece: int, score_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors, "_PIECE_BYTES", piece)
    output = succeeded(run("inspect", score_path))
    assert "exact, sums of squares" in output
    assert "4 in 2 batches" in output
    assert "1 tensors one sample at a time" in output
    assert cells(output, "z.weight") == ["2x2", "7.500e-01", "1"]  # 12 / 4 weights / 4 samples
    assert cells(output, "a.bias") == ["3", "0.000e+00", "3"]


def test_json_has_it_all(mask_path: Path, path: Path, score_path: Path) -> None:
    mask = json.loads(succeeded(run("inspect", mask_path, "--json")))
    assert mask["kind"] == "mask"
    assert mask["facts"]["num_selected"] == 300
    assert mask["layers"][0] == {
        "name": "z.weight", "shape": [50, 40], "num_params": 2000, "share": 0.1,
        "num_selected": 200, "dtype": None, "num_zero": None,
    }  # fmt: skip
    delta = json.loads(succeeded(run("inspect", path, "--json")))
    assert delta["facts"]["buffers"] == [
        "norm.num_batches_tracked", "norm.running_mean", "norm.running_var",
    ]  # fmt: skip
    assert delta["facts"]["base_ties"] == {"again.weight": "first.weight"}
    scores = json.loads(succeeded(run("inspect", score_path, "--json")))
    assert scores["facts"]["num_samples"] == 4
    assert scores["layers"][0]["share"] == 0.75
    assert scores["file_bytes"] == score_path.stat().st_size


@pytest.mark.parametrize(
    ("order", "shown"),
    [
        (["h.1.w", "h.10.w", "h.1²2", "h.2.w"], ["h.1.w", "h.1²2", "h.2.w", "h.10.w"]),
        (["wte", "h.10.w", "h.2.w"], ["wte", "h.10.w", "h.2.w"]),
    ],
    ids=["alphabetical", "of a model"],
)
def test_numbers_in_names_are_in_order(order: list[str], shown: list[str], tmp_path: Path) -> None:
    ff.SparseMask({}, dict.fromkeys(order, (1,))).save(tmp_path / "m")
    assert [layer.name for layer in ff.inspect_file(tmp_path / "m").layers] == shown


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    save_file({"w": torch.zeros(1)}, path, {"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "is not a whole safetensors file"),
    "one bit": (flip_last_bit, "does not match its checksum: the file is damaged"),
    "text": (lambda path: path.write_text("hello, what is this file?"), "is not a whole safetens"),
    "empty": (lambda path: path.write_bytes(b""), "is not a whole safetensors file"),
    "foreign": (
        foreign,
        "must be a mask, a delta or scores that fishfast saved; it is like a model's checkpoint",
    ),
    "of the future": (edit_metadata(format_version="9"), "has format_version '9'; this fishfast"),
    "gone": (Path.unlink, "No such file or directory: '"),
}


@pytest.mark.parametrize("kind", ["mask_path", "path", "score_path"])
@pytest.mark.parametrize("name", DAMAGE)
def test_bad_files_are_one_line(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    damaged: Path = request.getfixturevalue(kind)
    damage, text = DAMAGE[name]
    damage(damaged)
    assert re.search(text, failed(run("inspect", damaged)))


def test_damaged_header_of_scores(score_path: Path) -> None:
    for change, text in (
        ({"num_samples": "5"}, "the header does not match its checksum: the file is damaged"),
        ({"num_samples": "-5"}, "the header does not match its checksum: the file is damaged"),
        ({"sha256": "0"}, "does not match its checksum: the file is damaged"),
    ):
        whole = score_path.read_bytes()
        edit_metadata(**change)(score_path)
        assert text in failed(run("inspect", score_path))
        score_path.write_bytes(whole)


def test_scores_that_are_none(score_path: Path) -> None:
    set_negative = set_value("z.weight", -1.0)
    set_negative(score_path)
    assert "does not match its checksum: the file is damaged" in failed(run("inspect", score_path))
    signed(set_negative)(score_path)
    assert "scores must be at least 0; 'z.weight' has -1.0" in failed(run("inspect", score_path))


def test_a_device_is_no_file(path: Path, tmp_path: Path) -> None:
    assert "'/dev/null' must be a regular file" in failed(run("inspect", "/dev/null"))
    for base, delta in (("/dev/null", path), (path, "/dev/null")):
        result = run("apply", base, delta, "-o", tmp_path / "out")
        assert "'/dev/null' must be a regular file" in failed(result)


def test_pictures_that_cannot_be_are_refused_before_the_file_is_read(
    mask_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate(mask_path)
    before = sorted(os.listdir(tmp_path))
    for place, text in (
        (tmp_path / "none" / "out.png", "must exist; create it first"),
        ("/dev/null", "'/dev/null' must be a regular file or not exist"),
    ):
        assert text in failed(run("inspect", mask_path, "--png", place))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", mask_path, "--png", tmp_path / "out.png")
    assert "pictures need matplotlib" in failed(result)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.exit_code == 2
    assert "is a directory" in result.stderr


# --- apply and diff ---


def test_diff_then_apply_is_the_tuned_file(path: Path, tmp_path: Path) -> None:
    state = Net().state_dict()
    del state["again.weight"]
    save_file(state, tmp_path / "base")
    output = succeeded(run("apply", tmp_path / "base", path, "-o", tmp_path / "tuned"))
    delta = ff.load_delta(path)
    assert f"tuned: {delta.num_selected} weights set, {len(state)} tensors, " in output
    output = succeeded(run("diff", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "d"))
    found = ff.load_delta(tmp_path / "d")
    assert f"{found.num_selected} of {found.mask.num_params} weights differ (" in output
    assert f"and 3 buffers; {(tmp_path / 'd').stat().st_size:,} bytes" in output
    assert "% is much for a delta" in output
    succeeded(run("apply", tmp_path / "base", tmp_path / "d", "-o", tmp_path / "again"))
    assert load_file(tmp_path / "again").keys() == state.keys()
    assert (tmp_path / "again").read_bytes() == (tmp_path / "tuned").read_bytes()


def test_a_sparse_diff_has_no_note(tmp_path: Path) -> None:
    weights = torch.zeros(1000)
    save_file({"w": weights}, tmp_path / "base")
    weights[:100] = 1
    save_file({"w": weights}, tmp_path / "tuned")
    paths = tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "d"
    assert "is much" not in succeeded(run("diff", *paths))
    weights[100] = 1
    save_file({"w": weights}, tmp_path / "tuned")
    assert "10 % is much" in succeeded(run("diff", *paths))
    assert "101 of 1,000 weights" in succeeded(run("diff", *paths))
    output = succeeded(run("diff", *paths, "--buffer", "w"))
    assert "0 of 0 weights differ (0 %) and 1 buffers" in output
    save_file({"w": torch.ones(1000)}, tmp_path / "tuned")
    assert "must be smaller than" in failed(run("diff", *paths))
    assert "1,000 of 1,000 weights" in succeeded(run("diff", *paths, "--allow-large"))


def test_what_apply_tells_beside(path: Path, tmp_path: Path) -> None:
    state = Net().state_dict()
    for name in ("again.weight", "head.weight"):
        del state[name]
    state["other.weight"] = torch.zeros(2)
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.onnx").write_text("")
    output = succeeded(run("apply", tmp_path / "base", path, "-o", tmp_path / "out"))
    assert "added, as only the delta has them: head.weight\n" in output
    assert "as the delta's model does not have them: other.weight\n" in output
    assert "as the delta does not change these weights: model.onnx\n" in output


def test_apply_refuses_in_one_line(path: Path, tmp_path: Path) -> None:
    state = Net().state_dict()
    del state["again.weight"]
    state["norm.weight"] += 1
    save_file(state, tmp_path / "base")
    before = sorted(os.listdir(tmp_path))
    arguments = ["apply", tmp_path / "base", path, "-o", tmp_path / "out"]
    assert "weights or buffers differ" in failed(run(*arguments))
    assert "out must not be the base" in failed(run(*arguments[:-1], tmp_path / "base"))
    assert "must exist; create it first" in failed(run(*arguments[:-1], tmp_path / "no" / "out"))
    assert "No such file or directory: '" in failed(run("apply", tmp_path / "no", *arguments[2:]))
    assert sorted(os.listdir(tmp_path)) == before
    succeeded(run(*arguments, "--no-check-base"))


def test_diff_reads_nothing_for_a_place_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: Any, *_: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(place))

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the checkpoints are read")

    monkeypatch.setattr(ff, "diff_checkpoints", read)
    monkeypatch.setattr("fishfast.files.atomic.os.open", refuse)
    result = run("diff", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out")
    assert failed(result) == f"Error: Read-only file system: {str(tmp_path / 'out')!r}"


def test_control_c_leaves_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    state = Net().state_dict()
    del state["again.weight"]
    save_file(state, tmp_path / "base")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr("fishfast.files.tensor_writer.raw_bytes", stop)
    result = run("apply", tmp_path / "base", path, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Stopped.\n")
    assert sorted(os.listdir(tmp_path)) == before


def test_progress_where_it_is_asked_for(path: Path, tmp_path: Path) -> None:
    state = Net().state_dict()
    del state["again.weight"]
    save_file(state, tmp_path / "base")
    arguments = ["apply", tmp_path / "base", path, "-o", tmp_path / "out"]
    assert "100%" in run(*arguments, "--progress").stderr
    succeeded(run(*arguments))  # no terminal: nothing on stderr
    same = ["diff", tmp_path / "base", tmp_path / "base", "-o", tmp_path / "d", "--progress"]
    assert "100%" in run(*same).stderr


def test_outputs_never_take_the_place_of_inputs(mask_path: Path, tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder, step in ((base, 0), (tuned, 1)):
        folder.mkdir()
        state = {"w": torch.arange(100.0)}
        state["w"][3] += step
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    files = [mask_path, *base.iterdir(), *tuned.iterdir()]
    before = [file.read_bytes() for file in files]
    (tmp_path / "link").symlink_to(mask_path)
    command = ["diff", base, tuned, "-o"]
    for place in files[1:]:
        assert "which this command reads, and must not be" in failed(run(*command, place))
    weights = base / "model.safetensors", tuned / "model.safetensors"
    assert "must not be its output too" in failed(run("diff", *weights, "-o", weights[0]))
    for place in (mask_path, tmp_path / "link"):
        assert "must not be its output too" in failed(run("inspect", mask_path, "--png", place))
    assert [file.read_bytes() for file in files] == before
    for _ in range(2):  # a delta may lie there, and be written again
        succeeded(run(*command, tuned / "delta.safetensors"))


@pytest.mark.parametrize("what", ["delta", "picture", "file", "folder"])
def test_a_full_disk_leaves_nothing_and_is_named(
    what: str, path: Path, mask_path: Path, tmp_path: Path
) -> None:
    """In a process of its own, whose files may have 512 bytes."""
    state = Net().state_dict()
    del state["again.weight"]
    base = tmp_path / "base"
    base.mkdir()
    save_file(state, base / "model.safetensors")
    file, out = base / "model.safetensors", tmp_path / "out"
    (tmp_path / "tuned").mkdir()
    save_file(
        {name: tensor + 1 for name, tensor in state.items()}, tmp_path / "tuned/model.safetensors"
    )
    arguments = {
        "delta": ["diff", base, tmp_path / "tuned", "--allow-large", "-o", out],
        "picture": ["inspect", mask_path, "--png", out],
        "file": ["apply", file, path, "-o", out],
        "folder": ["apply", base, path, "-o", out],
    }[what]
    limited = (
        "import resource, signal, sys; from fishfast.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)); main()"
    )
    before = sorted(os.listdir(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False
    )
    assert done.stderr == f"Error: File too large: {str(out)!r}\n"
    assert done.stdout == ""
    assert done.returncode == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_a_real_process(path: Path, mask_path: Path) -> None:
    """Exit codes and streams, without what only a test runner gives."""
    command = [sys.executable, "-m", "fishfast", "inspect"]
    done = subprocess.run([*command, mask_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout == succeeded(run("inspect", mask_path))
    truncate(path)
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1


# --- info and help ---


def test_info_tells_versions_roads_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    output, built = succeeded(run("info")), ff.build_info()
    assert cells(output, "Python")[0] == platform.python_version()
    assert cells(output, "torch")[0] == torch.__version__ + ","
    for operation, roads in built["operations"].items():
        words = cells(output, operation)
        assert [word for word in words if word in ("cpu", "cuda", "triton", "torch")] == [
            roads["cpu"], roads["cuda"],
        ]  # fmt: skip
    for name, why in built["unavailable"].items():
        assert f"{name} is off:" in output
        assert why in output
    facts = json.loads(succeeded(run("info", "--json")))
    assert facts["operations"] == built["operations"]
    assert len(facts["gpus"]) == torch.cuda.device_count()
    nothing = {**built, "extension": None, "compiler": None, "nvcc": None}
    monkeypatch.setattr(ff, "build_info", lambda: nothing)
    output = succeeded(run("info"))
    for name in ("extension", "compiler", "nvcc"):
        assert cells(output, name) == ["none"]


def test_every_command_has_a_help_of_its_own() -> None:
    assert set(main.commands) == {"apply", "demo", "diff", "info", "inspect", "score"}
    for name, command in main.commands.items():
        output = succeeded(run(name, "--help"))
        assert "Raises" not in output
        assert "\\" not in output.replace("\\\n", "")
        for parameter in command.params:
            if parameter.name not in ("batch_size", "seed", "progress"):
                assert getattr(parameter, "help", "argument") or parameter.param_type_name, name
    assert not [line for line in succeeded(run("--help")).splitlines() if line.endswith(" ...")]
    assert not re.search(r"\w\.\.\.", succeeded(run("--help")))  # cut off
