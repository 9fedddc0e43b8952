"""Deltas: bit-exact on and off, refused where they do not belong, never half-written."""

from __future__ import annotations

import copy
import json
import os
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from stepping import mask_of, same_bits, some_indices
from torch import Tensor, nn

import fishfast as ff
from fishfast import _files


class Net(nn.Module):
    """Conv, norm with buffers, a tied pair, and a head that is fresh in every process."""

    def __init__(self, head_seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 6)
        self.again = nn.Linear(4, 6)
        self.again.weight = self.first.weight
        torch.manual_seed(head_seed)
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).mean((2, 3))
        return self.head(self.first(x).tanh() + self.again(x))


def images(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_with_head(model: nn.Module, seed: int = 0) -> ff.SparseMask:
    """Return a mask with some entries of every parameter and all of the head."""
    return mask_of(
        model,
        {
            name: torch.arange(p.numel())
            if name.startswith("head")
            else some_indices(p.numel(), seed=seed)
            for name, p in model.named_parameters()
        },
    )


def train(tuned: ff.SparseTuning, steps: int = 3) -> None:
    optimizer = ff.AdamW(tuned.parameters(), lr=0.05)
    for seed in range(steps):
        optimizer.zero_grad()
        dtype = next(iter(tuned.model.parameters())).dtype
        tuned.model(images(seed, dtype)).float().square().sum().backward()
        optimizer.step()


def trained(dtype: torch.dtype = torch.float32) -> ff.SparseTuning:
    model = Net().to(dtype)
    tuned = ff.train_only(model, mask_with_head(model))
    train(tuned)
    return tuned


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(state[name], tensor), name


@pytest.fixture(scope="module")
def tuned() -> ff.SparseTuning:
    torch.manual_seed(0)
    return trained()


@pytest.fixture
def path(tuned: ff.SparseTuning, tmp_path: Path) -> Path:
    ff.save_delta(tuned, tmp_path / "task.safetensors")
    return tmp_path / "task.safetensors"


# --- on and off ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_and_revert_are_bit_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    tuned = trained(dtype)
    ff.save_delta(tuned, tmp_path / "d")
    base = Net().to(dtype)
    before = state_of(base)
    delta = ff.load_delta(tmp_path / "d")
    assert delta.num_selected == tuned.num_selected
    assert delta.mask == tuned.mask
    for _ in range(2):
        assert delta.apply_(base) is base
        assert_state(base, state_of(tuned.model))
        with torch.no_grad():
            assert same_bits(base.eval()(images(9, dtype)), tuned.model.eval()(images(9, dtype)))
        base.train()
        assert base.again.weight is base.first.weight
        assert delta.revert_(base) is base
        assert_state(base, before)
    changed = [n for n, t in before.items() if not same_bits(tuned.model.state_dict()[n], t)]
    assert {"conv.weight", "head.weight", "norm.running_mean", "norm.num_batches_tracked"} <= set(
        changed
    )


def test_base_with_another_fresh_head_is_the_base(path: Path, tuned: ff.SparseTuning) -> None:
    base = Net(head_seed=99)
    before = state_of(base)
    delta = ff.load_delta(path)
    delta.apply_(base)
    assert_state(base, state_of(tuned.model))
    delta.revert_(base)
    assert_state(base, before)


def test_file_holds_k_entries_and_little_else(path: Path, tuned: ff.SparseTuning) -> None:
    with safe_open(path, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        entries = sum(file.get_tensor(k).numel() for k in keys if k.startswith("values/"))
    assert entries == tuned.num_selected
    header = int.from_bytes(path.read_bytes()[:8], "little")
    buffers = 2 * 4 * 4 + 8  # running_mean, running_var, num_batches_tracked
    assert path.stat().st_size == 8 + header + 8 * tuned.num_selected + buffers
    assert metadata["format"] == "fishfast.delta"
    assert {key for key in keys if key.startswith("buffer/")} == {
        "buffer/norm.running_mean", "buffer/norm.running_var", "buffer/norm.num_batches_tracked",
    }  # fmt: skip


def test_file_has_no_pickle(path: Path) -> None:
    assert not zipfile.is_zipfile(path)
    with pytest.raises((ValueError, IndexError)):
        list(pickletools.genops(path.read_bytes()))
    for source in Path(ff.__file__).parent.rglob("*.py"):
        text = source.read_text()
        assert "torch.save" not in text, source
        assert "torch.load(" not in text, source
        assert "import pickle" not in text, source


def test_buffers_that_did_not_change_are_not_saved(tmp_path: Path) -> None:
    model = Net().eval()
    tuned = ff.train_only(model, mask_with_head(model))
    train(tuned)
    ff.save_delta(tuned, tmp_path / "d")
    delta = ff.load_delta(tmp_path / "d")
    assert not delta.buffers
    assert repr(delta).startswith(
        f"Delta({tuned.num_selected} of {tuned.mask.num_params} weights, 0"
    )


def test_buffers_that_overlap_in_memory(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        model.register_buffer("whole", torch.zeros(4))
        model.register_buffer("part", model.whole[:2])
        return model

    model = make()
    tuned = ff.train_only(model, mask_of(model, {"bias": torch.arange(2)}))
    model.whole += 1.0
    ff.save_delta(tuned, tmp_path / "d")
    other = make()
    ff.load_delta(tmp_path / "d").apply_(other)
    assert torch.equal(other.whole, torch.ones(4))
    assert torch.equal(other.part, torch.ones(2))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_base_in_another_memory_layout(path: Path, tuned: ff.SparseTuning, layout: str) -> None:
    base = Net()
    if layout == "channels_last":
        base.to(memory_format=torch.channels_last)
    else:
        base.head.weight = nn.Parameter(base.head.weight.detach().t().contiguous().t())
    before = state_of(base)
    delta = ff.load_delta(path)
    delta.apply_(base)
    assert_state(base, state_of(tuned.model))
    delta.revert_(base)
    assert_state(base, before)


def test_disjoint_deltas_stack_without_the_base_check(tmp_path: Path) -> None:
    everything = ff.random_mask(Net(), density=0.6, seed=0)
    halves = [
        mask_of(Net(), {name: found[part::2] for name, found in everything.items()})
        for part in range(2)
    ]
    deltas, models = [], []
    for part, mask in enumerate(halves):
        model = Net().eval()
        tuned = ff.train_only(model, mask)
        train(tuned)
        ff.save_delta(tuned, tmp_path / str(part))
        deltas.append(ff.load_delta(tmp_path / str(part)))
        models.append(model)
    base = Net()
    before = state_of(base)
    deltas[0].apply_(base)
    with pytest.raises(ValueError, match="another base model: its weights or buffers differ"):
        deltas[1].apply_(base)
    assert_state(base, state_of(models[0]))
    deltas[1].apply_(base, check_base=False)
    for mask, model in zip(halves, models, strict=True):
        for name, found in mask.items():
            ours = base.state_dict()[name].flatten()[found.long()]
            assert same_bits(ours, model.state_dict()[name].flatten()[found.long()])
    deltas[0].revert_(base)  # disjoint: the order does not matter
    deltas[1].revert_(base)
    assert_state(base, before)


def test_several_models_have_the_same_delta(path: Path, tuned: ff.SparseTuning) -> None:
    delta = ff.load_delta(path)
    first, second = Net(), Net(head_seed=3)
    befores = state_of(first), state_of(second)
    delta.apply_(first)
    delta.apply_(second)
    delta.revert_(first)
    assert_state(first, befores[0])
    assert_state(second, state_of(tuned.model))
    delta.revert_(second)
    assert_state(second, befores[1])


def test_model_under_train_only(path: Path, tuned: ff.SparseTuning, tmp_path: Path) -> None:
    model = Net(head_seed=1)
    other = ff.train_only(model, ff.random_mask(model, density=0.5, seed=8))
    delta = ff.load_delta(path)
    delta.apply_(model)
    assert_state(model, state_of(tuned.model))
    for parameter in other.parameters():  # the masters follow
        parameter.grad = torch.zeros_like(parameter)
    ff.SGD(other.parameters(), lr=0.1).step()
    assert_state(model, state_of(tuned.model))
    delta.revert_(model)
    delta.apply_(model)
    train(other, 1)
    with pytest.raises(RuntimeError, match="not on top: .* was changed after apply_"):
        delta.revert_(model)


def test_saving_from_a_released_or_copied_model(path: Path, tmp_path: Path) -> None:
    tuned = trained()
    copied = copy.deepcopy(tuned)
    ff.save_delta(copied, tmp_path / "copied")
    tuned.release()
    ff.save_delta(tuned, tmp_path / "released")
    expected = take_apart(path)  # but for the order of the header, which safetensors leaves open
    assert take_apart(tmp_path / "copied") == expected
    assert take_apart(tmp_path / "released") == expected


def test_whole_mask_of_a_bare_scalar_and_an_empty_parameter(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Module()
        model.scale = nn.Parameter(torch.tensor(2.0))
        model.nothing = nn.Parameter(torch.empty(0, 3))
        return model

    model = make()
    tuned = ff.train_only(model, mask_of(model, {"scale": torch.arange(1)}))
    (model.scale * 3).backward()
    ff.SGD(tuned.parameters(), lr=1.0).step()
    ff.save_delta(tuned, tmp_path / "d")
    other = make()
    ff.load_delta(tmp_path / "d").apply_(other)
    assert other.scale.item() == -1.0


# --- where a delta does not belong ---


def other_content() -> nn.Module:
    model = Net()
    with torch.no_grad():
        model.conv.bias[0] += 1e-7
    return model


def other_buffer() -> nn.Module:
    model = Net()
    model.norm.running_mean[1] = 0.5
    return model


def negative_zero() -> nn.Module:
    model = Net()
    assert model.norm.running_mean[0] == 0
    model.norm.running_mean[0] = -0.0
    return model


def extra_layer() -> nn.Module:
    model = Net()
    model.extra = nn.Linear(1, 1)
    return model


def untied() -> nn.Module:
    model = Net()
    model.again.weight = nn.Parameter(model.first.weight.detach().clone())
    return model


def without_conv() -> nn.Module:
    model = Net()
    model.conv = nn.Identity()
    return model


def other_shape() -> nn.Module:
    model = Net()
    model.conv = nn.Conv2d(3, 5, 3)
    return model


def without_buffers() -> nn.Module:
    model = Net()
    model.norm = nn.BatchNorm2d(4, track_running_stats=False)
    return model


WRONG_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one weight differs": (other_content, "another base model: its weights or buffers differ"),
    "one buffer differs": (other_buffer, "another base model: its weights or buffers differ"),
    "sign of a zero": (negative_zero, "another base model: its weights or buffers differ"),
    "extra layer": (extra_layer, "another base model: its names, shapes, dtypes or ties differ"),
    "tied weight untied": (untied, "another base model: its names, shapes, dtypes or ties differ"),
    "layer missing": (without_conv, r"must fit the model; it names 'conv\.weight'"),
    "another shape": (other_shape, r"must fit the model; 'conv\.weight' has shape \(4, 3, 3, 3\)"),
    "another dtype": (lambda: Net().bfloat16(), "must fit the model; .* is torch.float32 in the"),
    "buffers missing": (without_buffers, "must fit the model; it sets the buffer 'norm\\."),
}


@pytest.mark.parametrize("name", WRONG_BASES)
def test_another_base_is_refused(name: str, path: Path) -> None:
    make, message = WRONG_BASES[name]
    model = make()
    before = state_of(model)
    delta = ff.load_delta(path)
    with pytest.raises(ValueError, match=message):
        delta.apply_(model)
    assert_state(model, before)
    with pytest.raises(RuntimeError, match="this delta is not on the model"):
        delta.revert_(model)


@pytest.mark.parametrize(
    "name", ["another dtype", "another shape", "layer missing", "buffers missing"]
)
def test_what_does_not_fit_is_refused_without_the_base_check_too(name: str, path: Path) -> None:
    make, message = WRONG_BASES[name]
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        ff.load_delta(path).apply_(model, check_base=False)
    assert_state(model, before)


def test_applied_twice_is_refused(path: Path, tuned: ff.SparseTuning) -> None:
    delta, base = ff.load_delta(path), Net()
    delta.apply_(base)
    for options in ({}, {"check_base": False}):
        with pytest.raises(RuntimeError, match="on the model already; call revert_ first"):
            delta.apply_(base, **options)
    with pytest.raises(ValueError, match="revert what was put on it"):
        ff.load_delta(path).apply_(base)  # the same file, read again
    assert_state(base, state_of(tuned.model))


def test_revert_without_apply_is_refused(path: Path) -> None:
    delta, base = ff.load_delta(path), Net()
    with pytest.raises(RuntimeError, match="this delta is not on the model: apply_ was not called"):
        delta.revert_(base)
    delta.apply_(base)
    with pytest.raises(RuntimeError, match="not on the model"):
        delta.revert_(copy.deepcopy(base))
    delta.revert_(base)
    with pytest.raises(RuntimeError, match="not on the model"):
        delta.revert_(base)


@pytest.mark.parametrize("what", ["weight", "buffer", "delta on top"])
def test_revert_that_is_not_on_top_is_refused(what: str, path: Path, tmp_path: Path) -> None:
    delta, base = ff.load_delta(path), Net()
    delta.apply_(base)
    if what == "weight":
        entry = int(delta.mask["conv.weight"][0])
        with torch.no_grad():
            base.conv.weight.view(-1)[entry] += 1
    elif what == "buffer":
        base.norm.running_var[0] += 1
    else:
        model = Net()
        other = ff.train_only(model, mask_with_head(model, seed=1))
        train(other, 1)
        ff.save_delta(other, tmp_path / "other")
        ff.load_delta(tmp_path / "other").apply_(base, check_base=False)
    before = state_of(base)
    with pytest.raises(RuntimeError, match="the delta is not on top: .* undo that first"):
        delta.revert_(base)
    assert_state(base, before)


# --- saving ---


def test_save_refuses_what_is_no_tuning(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="tuned must be what train_only returned; got Net"):
        ff.save_delta(Net(), tmp_path / "d")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["weight", "buffer"])
def test_save_refuses_values_that_are_not_finite(path: Path, value: float, where: str) -> None:
    old = path.read_bytes()
    tuned = trained()
    if where == "weight":
        parameter = next(tuned.parameters())
        parameter.data[0] = value
        parameter.target.scatter_(parameter)
        message = r"values must be finite; 'conv\.weight_values' in the trained model"
    else:
        tuned.model.norm.running_mean[0] = value
        message = r"values must be finite; 'norm\.running_mean' in the trained model"
    with pytest.raises(ValueError, match=message):
        ff.save_delta(tuned, path)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_save_refuses_values_that_were_not_written_into_the_weights(path: Path) -> None:
    old = path.read_bytes()
    model = Net()
    tuned = ff.train_only(model, mask_with_head(model))
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"'conv.weight_values' were not written .*tuned.attach"):
        ff.save_delta(tuned, path)
    assert path.read_bytes() == old


def test_save_refuses_a_model_of_another_dtype(path: Path) -> None:
    old = path.read_bytes()
    tuned = trained()
    tuned.model.bfloat16()
    with pytest.raises(
        RuntimeError, match="changed since train_only, so the delta would fit no base"
    ):
        ff.save_delta(tuned, path)
    assert path.read_bytes() == old


def test_missing_folder_is_named(tuned: ff.SparseTuning, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        ff.save_delta(tuned, tmp_path / "missing" / "d")
    assert not list(tmp_path.iterdir())


def test_target_that_is_a_folder(tuned: ff.SparseTuning, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError, match="directory"):
        ff.save_delta(tuned, tmp_path / "d")
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("failing", ["save_file", "chmod", "fsync", "replace"])
def test_failure_while_saving_keeps_the_old_file(
    path: Path, tuned: ff.SparseTuning, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(_files if failing == "save_file" else os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        ff.save_delta(tuned, path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_order_of_the_atomic_save(
    path: Path, tuned: ff.SparseTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append(("fsync", "folder" if name == str(path.parent) else "file"))
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        assert Path(source).parent == path.parent  # a rename across file systems is no rename
        assert ff.load_delta(source).num_selected == tuned.num_selected  # whole before it counts
        seen.append(("replace", Path(target).name))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    ff.save_delta(tuned, path)
    assert seen == [("fsync", "file"), ("replace", path.name), ("fsync", "folder")]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tuned: ff.SparseTuning, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        ff.save_delta(tuned, tmp_path / "d")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o666 & ~umask


# Runs in its own process, which forks a child per kill: forking pytest's would copy its threads.
KILLER = """
import os, random, signal, sys, time
import torch
import fishfast as ff
from fishfast import _files

torch.set_num_threads(1)
target = sys.argv[1]
tunings = []
for k in (200_000, 300_000):
    model = torch.nn.Linear(1000, 1000)
    tunings.append(ff.train_only(model, ff.random_mask(model, k=k, seed=0)))
whole = (200_000, 300_000)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killing(module, name, call, after):
    real, count = getattr(module, name), [0]

    def patched(*arguments, **options):
        count[0] += 1
        if count[0] == call and not after:
            die()
        result = real(*arguments, **options)
        if count[0] == call and after:
            die()
        return result

    setattr(module, name, patched)


def run(child, delay=None):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


points = [(_files, "save_file", 1), (os, "chmod", 1), (os, "fsync", 1), (os, "replace", 1),
          (os, "fsync", 2)]
for module, name, call in points:
    for after in (False, True):
        ff.save_delta(tunings[0], target)

        def child():
            killing(module, name, call, after)
            ff.save_delta(tunings[1], target)

        run(child)
        replaced = (name, call) == ("fsync", 2) or (name == "replace" and after)
        assert ff.load_delta(target).num_selected == whole[replaced], (name, call, after)

def loop():
    while True:
        for tuned in tunings:
            ff.save_delta(tuned, target)

random.seed(0)
seen = set()
for _ in range(int(sys.argv[2])):
    run(loop, delay=random.uniform(0.0, 0.06))
    found = ff.load_delta(target).num_selected
    assert found in whole, found
    seen.add(found)
print("killed", 2 * len(points), sorted(seen))
"""


def test_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "d"), "40"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "killed 10 [200000, 300000]\n"


# --- bad files; a refused file changes nothing ---

Header = dict[str, Any]


def take_apart(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(path: Path, header: Header | str | bytes, data: bytes) -> None:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def replace_bytes(path: Path, key: str, change: Callable[[bytearray], None]) -> None:
    header, data = take_apart(path)
    start, end = header[key]["data_offsets"]
    part = bytearray(data[start:end])
    change(part)
    put_together(path, header, data[:start] + bytes(part) + data[end:])


def int32(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


def set_index(position: int, value: int) -> Callable[[Path], None]:
    def change(part: bytearray) -> None:
        position_in_bytes = 4 * (position % (len(part) // 4))
        part[position_in_bytes : position_in_bytes + 4] = int32(value)

    return lambda path: replace_bytes(path, "indices/conv.weight", change)


def repeat_first_index(path: Path) -> None:
    def change(part: bytearray) -> None:
        part[4:8] = part[:4]

    replace_bytes(path, "indices/conv.weight", change)


def swap_indices(path: Path) -> None:
    def change(part: bytearray) -> None:
        part[:8] = part[4:8] + part[:4]

    replace_bytes(path, "indices/conv.weight", change)


def move_index(path: Path) -> None:
    def change(part: bytearray) -> None:
        indices = torch.frombuffer(part, dtype=torch.int32)
        gap = int((indices.diff() > 1).nonzero()[0])
        indices[gap] += 1

    replace_bytes(path, "indices/conv.weight", change)


def set_value(key: str, value: float) -> Callable[[Path], None]:
    raw = torch.tensor([value]).numpy().tobytes()

    def change(part: bytearray) -> None:
        part[:4] = raw

    return lambda path: replace_bytes(path, key, change)


def edit_metadata(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        for name, value in changes.items():
            if value is None:
                del header["__metadata__"][name]
            else:
                header["__metadata__"][name] = value
        put_together(path, header, data)

    return edit


def edit_shapes(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        shapes = json.loads(header["__metadata__"]["shapes"])
        shapes.update({"conv.weight": changes["conv"]})
        header["__metadata__"]["shapes"] = json.dumps(shapes)
        put_together(path, header, data)

    return edit


def edit_entry(key: str, **changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        header[key].update(changes)
        put_together(path, header, data)

    return edit


def rename(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        put_together(path, {new if k == old else k: v for k, v in header.items()}, data)

    return edit


def add_tensor(key: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        end = len(data)
        header[key] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
        put_together(path, header, data + b"\0\0\0\0")

    return edit


def split_last_value(path: Path) -> None:
    """Give one value of a parameter to another tensor, so that lengths disagree."""
    header, data = take_apart(path)
    entry = header["values/conv.weight"]
    start, end = entry["data_offsets"]
    entry["data_offsets"], entry["shape"] = [start, end - 4], [(end - start) // 4 - 1]
    header["buffer/stray"] = {"dtype": "F32", "shape": [1], "data_offsets": [end - 4, end]}
    put_together(path, header, data)


def name_twice(path: Path) -> None:
    header, data = take_apart(path)
    entry = json.dumps(header["values/conv.bias"])
    put_together(path, json.dumps(header)[:-1] + f', "values/conv.bias": {entry}}}', data)


def name_metadata_twice(path: Path) -> None:
    header, data = take_apart(path)
    text = json.dumps(header).replace(
        '"format_version"', '"format_version": "1", "format_version"', 1
    )
    put_together(path, text, data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"extra")


def content(raw: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(raw)


DEEP = "[" * 100_000
BAD_SHAPE = "the shape of 'conv.weight' must be whole numbers >= 0; got"

BAD_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "name twice": (name_twice, "names 'values/conv.bias' twice in its header"),
    "metadata twice": (name_metadata_twice, "names 'format_version' twice in its header"),
    "negative index": (set_index(0, -1), "indices of 'conv.weight' reach from -1"),
    "index too large": (
        set_index(-1, 108),
        "'conv.weight' reach from .* to 108 in a tensor of 108",
    ),
    "largest index": (set_index(-1, 2**31 - 1), "'conv.weight' reach from .* to 2147483647"),
    "index twice": (repeat_first_index, "indices of 'conv.weight' are not strictly ascending"),
    "unsorted": (swap_indices, "indices of 'conv.weight' are not strictly ascending"),
    "another index": (move_index, "does not match its fingerprint: the file is damaged"),
    "NaN": (set_value("values/conv.bias", torch.nan), "must be finite; 'conv.bias' in "),
    "infinite": (set_value("values/conv.bias", -torch.inf), "must be finite; 'conv.bias' in "),
    "NaN in a buffer": (
        set_value("buffer/norm.running_var", torch.nan),
        "must be finite; 'norm.running_var' in ",
    ),
    "lengths disagree": (split_last_value, "holds 32 indices and 31 values of 'conv.weight'"),
    "indices are floats": (
        edit_entry("indices/conv.weight", dtype="F32"),
        "indices of 'conv.weight' are torch.float32",
    ),
    "indices of two dimensions": (
        edit_entry("indices/conv.weight", shape=[4, 8]),
        r"indices of 'conv.weight' are torch.int32 of shape \(4, 8\)",
    ),
    "values are integers": (
        edit_entry("values/conv.weight", dtype="I32"),
        "values must be floating; 'conv.weight' has torch.int32",
    ),
    "values of two dimensions": (edit_entry("values/conv.weight", shape=[4, 8]), "32 indices and"),
    "values without indices": (
        rename("indices/conv.weight", "buffer/conv"),
        "only one of them for 'conv.weight'",
    ),
    "indices without values": (
        rename("values/conv.weight", "buffer/conv"),
        "only one of them for 'conv.weight'",
    ),
    "extra tensor": (add_tensor("more"), "holds 'more', which is no part of a delta"),
    "values of a parameter without a shape": (
        edit_metadata(shapes='{"conv.weight": [4, 3, 3, 3]}'),
        "missing",
    ),
    "another number of weights": (edit_shapes(conv=[4, 3, 3, 4]), "does not match its fingerprint"),
    "negative dimension": (edit_shapes(conv=[-4, -27]), BAD_SHAPE),
    "dimension of another type": (edit_shapes(conv=[108.0]), BAD_SHAPE),
    "dimensions as a string": (edit_shapes(conv="108"), BAD_SHAPE),
    "dimensions in a list": (edit_shapes(conv=[[108]]), BAD_SHAPE),
    "dimension true": (edit_shapes(conv=[True, 108]), BAD_SHAPE),
    "one number as shape": (edit_shapes(conv=108), "broken header"),
    "shapes are no JSON": (edit_metadata(shapes="{"), "broken header"),
    "shapes are a list": (edit_metadata(shapes="[1]"), "broken header"),
    "shapes too deep": (edit_metadata(shapes=DEEP), "broken header"),
    "no shapes": (edit_metadata(shapes=None), "broken header: KeyError"),
    "no base": (edit_metadata(base_content=None), "broken header: KeyError"),
    "newer version": (edit_metadata(format_version="2"), "has format_version '2'; .* upgrade"),
    "unknown version": (edit_metadata(format_version="one"), "has format_version 'one'"),
    "no version": (edit_metadata(format_version=None), "has format_version None"),
    "a mask": (edit_metadata(format="fishfast.mask"), "must be a fishfast.delta file"),
    "another program's": (edit_metadata(format="pt"), "must be a fishfast.delta file"),
    "truncated": (truncate, "is not a whole safetensors file"),
    "something appended": (append, "is not a whole safetensors file"),
    "empty": (content(b""), "is not a whole safetensors file"),
    "five bytes": (content(b"hello"), "is not a whole safetensors file"),
    "text": (content(b"what is this? no delta, surely"), "is not a whole safetensors file"),
    "header too deep": (
        lambda path: put_together(path, DEEP, b""),
        "is not a whole safetensors file",
    ),
    "header in UTF-16": (
        lambda path: put_together(path, "{}".encode("utf-16"), b""),
        "is not a whole safetensors file",
    ),
    "type that torch lacks": (
        edit_entry("buffer/norm.num_batches_tracked", dtype="C64X"),
        "is not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused(name: str, path: Path) -> None:
    damage, message = BAD_FILES[name]
    ff.load_delta(path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        ff.load_delta(path)


# Whole files that a model must refuse.
MISFITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "base of other values": (edit_metadata(base_content="0" * 64), "weights or buffers differ"),
    "base of another structure": (edit_metadata(base_structure="0" * 64), "dtypes or ties differ"),
    "values of another dtype": (
        edit_entry("values/conv.weight", dtype="I32"),
        "values must be floating",
    ),
    "unknown buffer": (add_tensor("buffer/norm.more"), "it sets the buffer 'norm.more'"),
    "buffer of another shape": (
        edit_entry("buffer/norm.running_mean", shape=[2, 2]),
        "it sets the buffer 'norm.running_mean'",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_file_that_does_not_fit_changes_nothing(name: str, path: Path) -> None:
    damage, message = MISFITS[name]
    damage(path)
    model = Net()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        ff.load_delta(path).apply_(model)
    assert_state(model, before)


def test_delta_of_names_that_the_model_lacks(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    tuned = ff.train_only(model, mask_of(model, {"weight": some_indices(6)}))
    ff.save_delta(tuned, tmp_path / "d")
    other = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="it names 'weight', which the model does not have"):
        ff.load_delta(tmp_path / "d").apply_(other, check_base=False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ff.load_delta(tmp_path / "nowhere")
