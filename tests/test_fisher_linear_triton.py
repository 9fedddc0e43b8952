"""fishfast.kernels.fisher_linear against float64 loops: in the interpreter, and on a card."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DTYPES
from triton_cpu import oracle, plain
from triton_cpu.comparing import assert_close, random
from triton_cpu.running import WHERE, run
from triton_cpu.worker import InWorker

# Name -> lengths of the samples, gaps of rows before each one that belong to no sample.
LAYOUTS = {
    "one-sample": ([70], 0),
    "one-row-each": ([1] * 5, 0),
    "short": ([3, 2, 5, 1], 0),
    "around-a-step": ([63, 64, 65, 1, 128, 16, 17], 0),
    "padded": ([33, 7, 40, 1], 9),
    "packed-with-empty": ([0, 20, 0, 0, 31, 5, 0], 0),
    "all-empty-but-one": ([0, 0, 3, 0], 4),
}
# O, I: odd, a multiple of 16, the large tile, several large tiles.
SHAPES = [(1, 1), (3, 17), (33, 31), (48, 16), (130, 97), (144, 272)]


def operands(lengths, gap, num_out, num_in, dtype):
    """Rows that no sample owns are NaN: none of them may reach a result."""
    starts, ends, row = [], [], 0
    for length in lengths:
        starts.append(row + gap)
        row = starts[-1] + length
        ends.append(row)
    grad = torch.full((row + gap, num_out), torch.nan, dtype=dtype)
    x = torch.full((row + gap, num_in), torch.nan, dtype=dtype)
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        grad[start:end] = random(end - start, num_out, dtype=dtype, seed=b)
        x[start:end] = random(end - start, num_in, dtype=dtype, seed=100 + b)
    return grad, x, torch.tensor(starts), torch.tensor(ends)


def check(where, score, grad, x, starts, ends, power, num_sms=8):
    before = score.clone()
    run(where, "add_linear", score, grad, x, starts, ends, power, num_sms=num_sms)
    assert_close(
        score,
        before,
        functools.partial(plain.linear, grad=grad, x=x, starts=starts, ends=ends, power=power),
        oracle.linear(grad, x, starts, ends, power),
    )


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples(where, layout, dtype, power) -> None:
    lengths, gap = LAYOUTS[layout]
    grad, x, starts, ends = operands(lengths, gap, 33, 49, dtype)
    check(where, torch.rand(33, 49), grad, x, starts, ends, power)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("starts", ["samples", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_shapes(where, num_out, num_in, dtype, starts) -> None:
    lengths = [40, 3, 18] if starts == "samples" else [19]
    grad, x, *bounds = operands(lengths, 0, num_out, num_in, dtype)
    check(
        where,
        torch.zeros(num_out, num_in),
        grad,
        x,
        *(bounds if starts == "samples" else (None, None)),
        power=2,
    )


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 100])
def test_every_row_a_sample(where, num_rows, dtype, power) -> None:
    grad, x, *_ = operands([num_rows], 0, 35, 20, dtype)
    check(where, torch.rand(35, 20), grad, x, None, None, power)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("num_sms", [1, 2, 100])
@pytest.mark.parametrize("shape", [(80, 80), (144, 144), (70, 96), (96, 70)], ids=str)
def test_samples_divided_among_programs(where, shape, num_sms) -> None:
    """One program, two groups of samples, and one program per sample give the same."""
    grad, x, starts, ends = operands([30, 20, 11, 70, 2], 3, *shape, torch.float32)
    check(where, torch.rand(shape), grad, x, starts, ends, 2, num_sms)


@pytest.mark.parametrize("starts", ["samples", "rows"])
@pytest.mark.parametrize(
    ("score", "is_direct"),
    [
        (torch.zeros(160, 160), True),
        (torch.zeros(160, 80).T, True),
        (torch.zeros(160, 176)[:, :80], True),
        (torch.zeros(160, 170)[:, :80], False),
        (torch.zeros(160, 160)[::2, ::2], False),
        (torch.zeros(160, 100), False),
        (torch.zeros(100, 160), False),
        (torch.zeros(160, 161)[:, 1:], False),
    ],
    ids=["contiguous", "transposed", "wide", "odd-stride", "both-strides", "odd-columns",
         "odd-rows", "odd-address"],
)  # fmt: skip
def test_score_needs_no_scratch(monkeypatch, score, is_direct, starts) -> None:
    """A second copy of a large weight's score is made only where vectors would not fit."""
    pytest.importorskip("triton")
    from fishfast.kernels import fisher_linear, fisher_linear_rows, launch, splits

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append(arguments)

    monkeypatch.setattr(launch, "num_sms", lambda device: 1)
    monkeypatch.setattr(fisher_linear, "samples_kernel", Kernel())
    monkeypatch.setattr(fisher_linear_rows, "rows_kernel", Kernel())
    monkeypatch.setattr(splits, "splits_kernel", Kernel())
    bounds = (torch.tensor([0, 5]), torch.tensor([5, 9]))
    grad, x = (torch.zeros(9, size) for size in score.shape)
    fisher_linear.add_linear(score, grad, x, *(bounds if starts == "samples" else (None,) * 2), 2)
    assert len(launched) == (1 if is_direct else 2)
    arguments = launched[0]
    assert (arguments["out_ptr"].data_ptr() == score.data_ptr()) == is_direct
    for name in ("num_out", "num_in", "stride_split", "stride_o"):
        assert arguments[name] % 16 == 0
    for name in ("out_ptr", "grad_ptr", "x_ptr"):
        assert arguments[name].data_ptr() % 16 == 0


@pytest.mark.parametrize("where", WHERE)
def test_squares_keep_more_bits_than_operands(where) -> None:
    """1.0625 squared needs one bit more than bf16 has, and fits tf32."""
    grad = torch.full((10, 16), 1.0625, dtype=torch.bfloat16)
    score = torch.zeros(16, 16)
    run(where, "add_linear", score, grad, grad, None, None, 2)
    torch.testing.assert_close(score, torch.full_like(score, 10 * 1.0625**4))


@pytest.mark.parametrize("where", WHERE)
def test_one_program_walks_through_many_samples(where) -> None:
    """More than the 128 whose steps are counted at once."""
    lengths = [b % 4 for b in range(300)]
    grad, x, starts, ends = operands(lengths, 0, 80, 80, torch.bfloat16)
    check(where, torch.rand(80, 80), grad, x, starts, ends, 2, num_sms=1)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("power", [1, 2])
def test_every_sample_begins_its_sum_anew(where, power) -> None:
    """Whatever f is: three samples at least, one of them empty, in each program."""
    grad, x, starts, ends = operands([3, 0, 5] * 4, 0, 20, 20, torch.float32)
    check(where, torch.rand(20, 20), grad, x, starts, ends, power, num_sms=1)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("num_sms", [1, 8])
@pytest.mark.parametrize("num_rows", [100, 1])
def test_transposed_score(where, num_rows, num_sms) -> None:
    """GPT-2 stores weights as [I, O]; the view passed is [O, I]."""
    score = torch.rand(48, 32).T
    grad, x, starts, ends = operands([num_rows, 5], 0, 32, 48, torch.float32)
    check(where, score, grad, x, starts, ends, 2, num_sms)
    assert score.stride() == (1, 32)


@pytest.mark.parametrize("where", WHERE)
def test_score_inside_a_larger_tensor(where) -> None:
    """Strides of both dims are free, and what lies between the elements stays."""
    whole = torch.rand(200, 200)
    rest = whole.clone()
    score = whole[4:164:2, 8:168:2]
    grad, x, starts, ends = operands([9, 30], 0, 80, 80, torch.float32)
    check(where, score, grad, x, starts, ends, 2, num_sms=1)
    rest[4:164:2, 8:168:2] = score
    assert torch.equal(whole, rest)


@pytest.mark.parametrize("where", WHERE)
def test_rows_of_a_wider_tensor(where) -> None:
    """A slice of a fused projection: contiguous columns, wider rows."""
    grad, x, starts, ends = operands([9, 30], 2, 64, 64, torch.bfloat16)
    check(where, torch.zeros(32, 48), grad[:, 16:48], x[:, 1:49], starts, ends, 2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("starts", ["samples", "rows"])
def test_same_bits_every_time(where, starts) -> None:
    grad, x, *bounds = operands([50, 3, 70, 8], 0, 100, 70, torch.bfloat16)
    scores = [torch.zeros(100, 70) for _ in range(2)]
    for score in scores:
        run(
            where,
            "add_linear",
            score,
            grad,
            x,
            *(bounds if starts == "samples" else (None, None)),
            2,
        )
    assert torch.equal(*scores)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("num_rows", "num_samples"), [(0, 0), (0, 3), (4, 0)])
def test_empty_batches(where, num_rows, num_samples) -> None:
    score = torch.rand(5, 7)
    before = score.clone()
    bounds = torch.zeros(num_samples, dtype=torch.int64)
    grad, x = torch.randn(num_rows, 5), torch.randn(num_rows, 7)
    assert run(where, "add_linear", score, grad, x, bounds, bounds, 2) <= 0
    assert torch.equal(score, before)


@pytest.mark.parametrize("where", WHERE)
def test_empty_weight(where) -> None:
    grad, x, starts, ends = operands([3], 0, 4, 0, torch.float32)
    assert run(where, "add_linear", torch.zeros(4, 0), grad, x, starts, ends, 2) <= 0


def test_sample_past_the_rows_is_caught() -> None:
    """The checker is on: a wrong end is an access out of bounds, not a wrong number."""
    grad, x, starts, ends = operands([16], 0, 16, 16, torch.float32)
    with pytest.raises(InWorker, match="out of bounds"):
        run("interpreter", "add_linear", torch.zeros(16, 16), grad, x, starts, ends + 1, 2)


@pytest.mark.gpu
def test_past_two_billion_elements() -> None:
    """Offsets need int64: samples and score both lie beyond 2**31 elements."""
    from fishfast.kernels.fisher_linear import add_linear

    num_rows, num_in = 2**27 + 64, 16
    x = torch.zeros(num_rows, num_in, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros(num_rows, num_in, dtype=torch.bfloat16, device="cuda")
    x[-40:], grad[-40:] = 1.0, 2.0
    score = torch.zeros(num_in, num_in, device="cuda")
    starts = torch.tensor([0, num_rows - 40], device="cuda")
    add_linear(score, grad, x, starts, starts + 40, 2)
    assert (score == 80.0**2).all()

    score = torch.zeros(2**17 + 16, 2**14, device="cuda")
    grad = torch.zeros(4, len(score), dtype=torch.bfloat16, device="cuda")
    grad[:, -1] = 1.0
    x = torch.ones(4, 2**14, dtype=torch.bfloat16, device="cuda")
    add_linear(score, grad, x, starts[:1], starts[:1] + 4, 2)
    assert (score[-1] == 16.0).all()
    assert not score[:-1].any()
