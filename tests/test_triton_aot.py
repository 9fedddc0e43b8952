"""Every configuration that can be launched compiles: no spills, shared memory that the card has.

The launches are recorded from the primitives themselves, over shapes that reach every configuration
of their tables, and layouts from all aligned to nothing aligned. Each is compiled for one of the
architectures, the next one for the next; `make test-long` compiles each for all of them.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_cpu.ahead_of_time import ARCHITECTURES, Launch, compile_all, record

pytest.importorskip("triton")

from fishfast.kernels import (  # noqa: E402
    fisher_conv,
    fisher_embedding,
    fisher_linear,
    fisher_linear_rows,
    fisher_sum,
    launch,
    linear_tile,
    splits,
)

# Bytes of shared memory that one program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISIONS = ["highest", "high"]


@pytest.fixture(autouse=True)
def _h200(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "num_sms", lambda device: 132)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch is older than 2.9"
)
def test_precision_set_in_the_new_way() -> None:
    for setting, expected in (("tf32", "tf32"), ("ieee", "ieee")):
        torch.backends.cuda.matmul.fp32_precision = setting
        assert launch.fp32_precision() == expected
    torch.set_float32_matmul_precision("high")
    assert launch.fp32_precision() == "tf32"


@pytest.fixture(params=["in turns", pytest.param("all", marks=pytest.mark.long)])
def architectures(request: pytest.FixtureRequest) -> str:
    """Which architectures a launch is compiled for."""
    return request.param


def is_pipelined(launch: Launch) -> bool:
    """Whether an sm_90 runs its products while the next operands are being copied."""
    large = launch.kernel == "samples_kernel" and 128 in dict(launch.constants).values()
    return large and dict(launch.signature)["grad_ptr"] != "*fp32"


def check(launches, num_expected, architectures) -> list:
    """Compile; ``num_expected`` says that the recorder saw what the test meant it to see."""
    launches = list(dict.fromkeys(launches))
    assert len(launches) == num_expected
    if architectures == "all":
        usages = compile_all(list(itertools.product(launches, ARCHITECTURES)))
        assert len(usages) == num_expected * len(SHARED)
    else:
        turns = itertools.cycle(ARCHITECTURES)
        usages = compile_all([(one, 90 if is_pipelined(one) else next(turns)) for one in launches])
        assert len(usages) == num_expected
        assert {usage.architecture for usage in usages} == SHARED.keys()
    for usage in usages:
        what = f"{usage.launch} for sm_{usage.architecture}"
        assert usage.stack_bytes == 0, f"spills {usage.stack_bytes} bytes: {what}"
        assert 0 < usage.registers <= 255, what
        assert usage.shared_bytes <= SHARED[usage.architecture], what
    return usages


def configs_of(launches, config):
    """The tables' entries that were reached: constants in the order of the kernels' arguments."""
    blocks = [name for name in config._fields if name.startswith("block")]
    reached = set()
    for one in launches:
        constants = [value for path, value in one.constants if len(path) == 1]
        reached.add((*constants[-len(blocks) :], dict(one.options)["num_warps"]))
    return reached


def table_of(configs):
    return {(*(v for k, v in c._asdict().items() if "block" in k), c.num_warps) for c in configs}


def precisions(dtype):
    """What the user may have set, where it matters."""
    for precision in PRECISIONS if dtype == torch.float32 else PRECISIONS[:1]:
        torch.set_float32_matmul_precision(precision)
        yield precision


def test_linear(architectures: str) -> None:
    launches = []
    kernels = [(fisher_linear, "samples_kernel"), (fisher_linear_rows, "rows_kernel")]
    kernels += [(splits, "splits_kernel")]  # see test_splits
    for dtype, side, rows in itertools.product(DTYPES, (64, 128, 50), (100, 24)):
        score, grad = torch.zeros(side, side), torch.zeros(2 * rows, side, dtype=dtype)
        samples = torch.tensor([0, rows]), torch.tensor([rows, 2 * rows])
        for _ in precisions(dtype):
            for bounds, power in itertools.product((samples, (None, None)), (1, 2)):
                launches += record(
                    kernels, fisher_linear.add_linear, score, grad, grad, *bounds, power
                )
    launches = [launch for launch in launches if launch.kernel != "splits_kernel"]
    tables = itertools.chain(*fisher_linear.CONFIGS.values(), fisher_linear_rows.CONFIGS.values())
    assert configs_of(launches, linear_tile.Config) == table_of(tables)
    pipelined = 0
    for usage in check(launches, 24, architectures):
        if is_pipelined(usage.launch) and usage.architecture == 90:
            assert "wgmma.mma_async" in usage.ptx
            assert "wgmma.wait_group.sync.aligned 1" in usage.ptx
            assert "cp.async" in usage.ptx
            pipelined += 1
    assert pipelined == 4


def sum_operands(dtype):
    """Contiguous features, contiguous positions, neither; aligned and not."""
    for size in (128, 67):
        for positions in (3, 32, 64):
            yield torch.zeros(2, positions, size, dtype=dtype)
            yield torch.zeros(2, size, positions, dtype=dtype).transpose(1, 2)
    yield torch.zeros(2, 64, 70, dtype=dtype)[:, :, ::2]


def test_sum(architectures: str) -> None:
    """A norm in every layout, for it has the most operands; the others in each configuration."""
    launches = []
    for dtype in DTYPES:
        for x in sum_operands(dtype):
            score, mean = torch.zeros(x.shape[2]), torch.zeros(2, x.shape[1], 1)
            kinds = [(x, mean, mean, 2)]
            if tuple(x.shape) in {(2, 3, 67), (2, 32, 67), (2, 64, 67)}:
                kinds += [(None, None, None, 2), (x, None, None, 2), (x, None, mean, 2)]
            if tuple(x.shape) in {(2, 3, 67), (2, 32, 67), (2, 64, 67), (2, 32, 128)}:
                kinds += [(x, mean, mean, 2, score.clone()), (x, None, mean, 2, score.clone())]
            for operands in kinds:
                kernels = [(fisher_sum, "sum_kernel"), (splits, "splits_kernel")]
                recorded = record(kernels, fisher_sum.add_sum, score, x, *operands)
                launches += [launch for launch in recorded if launch.kernel == "sum_kernel"]
    reached = configs_of(launches, fisher_sum.Config)
    assert reached == table_of(fisher_sum.CONFIGS.values())
    check(launches, 120, architectures)


def test_splits(architectures: str) -> None:
    """Weights, biases and both, aligned and not."""
    launches = []
    for size, has_bias in itertools.product((128, 67), (False, True)):
        for score in (torch.zeros(size, 3), torch.zeros(3, size).T):
            bias = (torch.zeros(size), torch.zeros(4, size)) if has_bias else ()
            out = torch.zeros(2, size, 3)
            launches += record([(splits, "splits_kernel")], splits.add_splits, score, out, *bias)
    check(launches, len(set(launches)), architectures)
    assert len(set(launches)) >= 4


def test_embedding(architectures: str) -> None:
    launches = []
    rows = torch.zeros(4, dtype=torch.int64)
    for dtype, size, transposed in itertools.product(DTYPES, (64, 67), (False, True)):
        score = torch.zeros(size, 3).T if transposed else torch.zeros(3, size)
        grad = torch.zeros(4, size, dtype=dtype)
        kernels = [(fisher_embedding, "embedding_kernel")]
        launches += record(kernels, fisher_embedding.add_embedding, score, rows, rows, grad, 2)
    check(launches, 3 * 2 * 2, architectures)


def test_conv(architectures: str) -> None:
    launches = []
    layouts = [torch.contiguous_format, torch.channels_last]
    sizes = [(16, 128, 18), (16, 16, 18), (7, 67, 9), (7, 5, 9)]
    for dtype, (channels, num_out, size), layout in itertools.product(DTYPES, sizes, layouts):
        score = torch.zeros(num_out, channels, 3, 3)
        x = torch.zeros(2, channels, size, size, dtype=dtype).contiguous(memory_format=layout)
        grad = torch.zeros(2, num_out, size - 2, size - 2, dtype=dtype)
        for _ in precisions(dtype):
            options = (1, 1), (0, 0), (1, 1), 1, 2
            kernels = [(fisher_conv, "conv_kernel")]
            launches += record(kernels, fisher_conv.add_conv, score, grad, x, *options)
    assert configs_of(launches, fisher_conv.Config) == table_of(fisher_conv.CONFIGS.values())
    check(launches, 32, architectures)
